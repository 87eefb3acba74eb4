"""``iconformer compare``; see ``python tools/compare.py --help``."""

from iconformer_mm.cli.compare import main

if __name__ == '__main__':
    main()
