"""See ``python tools/dataset_converters/make_scenes.py --help``."""

from iconformer_mm.cli.make_scenes import main

if __name__ == '__main__':
    main()
