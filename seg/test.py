"""Evaluate a checkpoint: python seg/test.py --help."""

import sys

from vim.openmmlab.runs import test

if __name__ == "__main__":
    sys.exit(test(None, "seg"))
