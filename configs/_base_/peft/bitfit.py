# BitFit (Ben Zaken et al., ACL 2022): biases are trained.
custom_hooks = [dict(type='PEFTHook', method=dict(type='bitfit'))]
