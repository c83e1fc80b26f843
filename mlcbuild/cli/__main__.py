"""`python -m mlcbuild.cli`."""

import sys

from mlcbuild.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
