"""The program `helena`, also as `python -m helena_cli`."""

import sys

from helena_cli.cli import run


def main() -> None:
    """Run the command line and exit with its code."""
    sys.exit(run())


if __name__ == "__main__":
    main()
