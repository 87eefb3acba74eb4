"""``iconformer test``; see ``python tools/test.py --help``."""

from iconformer_mm.cli.test import main

if __name__ == '__main__':
    main()
