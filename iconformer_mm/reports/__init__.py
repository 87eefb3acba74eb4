"""One HTML page about a training run or a comparison."""
