"""Train a configuration: python det/train.py --help."""

import sys

from vim.openmmlab.runs import train

if __name__ == "__main__":
    sys.exit(train(None, "det"))
