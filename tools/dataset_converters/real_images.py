"""``iconformer data``; see ``python tools/dataset_converters/real_images.py --help``."""

from iconformer_mm.cli.data import main

if __name__ == '__main__':
    main()
