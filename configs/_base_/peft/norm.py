# Normalisation layers are trained.
custom_hooks = [dict(type='PEFTHook', method=dict(type='norm'))]
