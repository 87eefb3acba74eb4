# Linear probing: the backbone is frozen, neck and head are trained.
custom_hooks = [dict(type='PEFTHook', method=dict(type='frozen'))]
