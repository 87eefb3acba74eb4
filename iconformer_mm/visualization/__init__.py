from .comparison import plot_comparison

__all__ = ['plot_comparison']
