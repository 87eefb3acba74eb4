"""``python -m iconformer_mm``, which is ``iconformer``."""

import sys

from iconformer_mm.cli.main import main

if __name__ == '__main__':
    sys.exit(main())
