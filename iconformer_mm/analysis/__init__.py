"""Looking into configs, models and adapters: costs and mistakes, kernels, saliency, learning rates."""
