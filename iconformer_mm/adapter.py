"""``python -m iconformer_mm.adapter``; the command is :mod:`iconformer_mm.cli.adapter`."""

import sys

from iconformer_mm.cli.adapter import main

if __name__ == '__main__':
    sys.exit(main())
