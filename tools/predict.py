"""``iconformer predict``; see ``python tools/predict.py --help``."""

from iconformer_mm.cli.predict import main

if __name__ == '__main__':
    main()
