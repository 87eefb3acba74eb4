# SSF (Lian et al., NeurIPS 2022): layers are scaled and shifted.
custom_hooks = [dict(type='PEFTHook', method=dict(type='ssf'))]
