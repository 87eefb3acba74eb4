"""See ``python tools/dataset_converters/nyu.py --help``."""

from iconformer_mm.cli.convert_nyu import main

if __name__ == '__main__':
    main()
