# SSF (Lian et al., NeurIPS 2022): scales and shifts the outputs of layers.
custom_hooks = [dict(type='PEFTHook', method=dict(type='ssf'))]
