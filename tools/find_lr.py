"""``iconformer find-lr``; see ``python tools/find_lr.py --help``."""

from iconformer_mm.cli.find_lr import main

if __name__ == '__main__':
    main()
