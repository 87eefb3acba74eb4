"""Fetch a real pre-trained model, DINOv2 ViT-S/14, for tests and trials; see ``iconformer fetch-real --help``."""

from iconformer_mm.cli.fetch_real import main

if __name__ == '__main__':
    main()
