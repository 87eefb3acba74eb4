"""``iconformer quickstart-real``; see ``python tools/quickstart_real.py --help``."""

from iconformer_mm.cli.quickstart_real import main

if __name__ == '__main__':
    main()
