"""``iconformer convert``; see ``python tools/convert_adapter.py --help``."""

from iconformer_mm.cli.convert import main

if __name__ == '__main__':
    main()
