"""Draw the prediction for one image over it: python det/infer.py --help."""

import sys

from vim.openmmlab.runs import infer

if __name__ == "__main__":
    sys.exit(infer(None, "det"))
