"""``iconformer inspect``; see ``python tools/inspect_model.py --help``."""

from iconformer_mm.cli.inspect import main

if __name__ == '__main__':
    main()
