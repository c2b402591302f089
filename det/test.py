"""Evaluate a checkpoint: python det/test.py --help."""

import sys

from vim.openmmlab.runs import test

if __name__ == "__main__":
    sys.exit(test(None, "det"))
