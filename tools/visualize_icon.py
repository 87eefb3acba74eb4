"""``iconformer visualize-icon``; see ``python tools/visualize_icon.py --help``."""

from iconformer_mm.cli.visualize_icon import main

if __name__ == '__main__':
    main()
