"""Entry point of ``accelerate launch -m mpo_ext.train RECIPE [KEY=VALUE ...]``."""

import sys

from mpo_ext.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
