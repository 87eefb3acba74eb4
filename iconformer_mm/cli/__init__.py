"""The commands, one module each; ``iconformer --help`` lists them."""
