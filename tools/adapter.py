"""Adapter files on the command line; see ``python tools/adapter.py --help``."""

import sys

from iconformer_mm.cli.adapter import main

if __name__ == '__main__':
    sys.exit(main())
