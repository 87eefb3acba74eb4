"""``iconformer train``; see ``python tools/train.py --help``."""

from iconformer_mm.cli.train import main

if __name__ == '__main__':
    main()
