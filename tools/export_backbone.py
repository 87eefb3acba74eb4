"""``iconformer export-backbone``; see ``python tools/export_backbone.py --help``."""

from iconformer_mm.cli.export_backbone import main

if __name__ == '__main__':
    main()
