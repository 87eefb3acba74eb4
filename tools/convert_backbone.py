"""``iconformer convert-backbone``; see ``python tools/convert_backbone.py --help``."""

from iconformer_mm.cli.convert_backbone import main

if __name__ == '__main__':
    main()
