"""``python -m crfnet``: the command ``crfnet`` where its script is not on the path."""

import sys

from crfnet.cli import main

if __name__ == "__main__":
    sys.exit(main())
