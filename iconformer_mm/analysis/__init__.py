"""Analysis of configs, models and adapters: costs, mistakes, kernels, saliency, learning rates."""
