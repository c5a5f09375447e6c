"""Entry point of ``python -m mpo_ext SUBCOMMAND``."""

import sys

from mpo_ext.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
