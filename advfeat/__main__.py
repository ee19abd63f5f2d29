"""``python -m advfeat``."""

import sys

from advfeat.cli import main

if __name__ == "__main__":
    sys.exit(main())
