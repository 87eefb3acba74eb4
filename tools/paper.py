"""``iconformer paper``; see ``python tools/paper.py --help``."""

from iconformer_mm.cli.paper import main

if __name__ == '__main__':
    main()
