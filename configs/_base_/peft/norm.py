# Trains the normalisation layers of the backbone.
custom_hooks = [dict(type='PEFTHook', method=dict(type='norm'))]
