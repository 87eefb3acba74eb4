"""``iconformer fetch-real``; see ``python tools/fetch_real.py --help``."""

from iconformer_mm.cli.fetch_real import main

if __name__ == '__main__':
    main()
