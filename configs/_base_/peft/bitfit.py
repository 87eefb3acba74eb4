# BitFit (Ben Zaken et al., ACL 2022): trains the biases.
custom_hooks = [dict(type='PEFTHook', method=dict(type='bitfit'))]
