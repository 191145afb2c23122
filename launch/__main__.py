"""`python -m launch`: the same as the `tubelet` command."""

import sys

from launch.cli import main

if __name__ == "__main__":
    sys.exit(main())
