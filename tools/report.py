"""``iconformer report``; see ``python tools/report.py --help``."""

from iconformer_mm.cli.report import main

if __name__ == '__main__':
    main()
