"""`python -m mvsplit` is the command `mvsplit`."""

import sys

from mvsplit.cli import main

if __name__ == "__main__":
    sys.exit(main())
