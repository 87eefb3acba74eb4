# Linear probing: backbone frozen, neck and head trained.
custom_hooks = [dict(type='PEFTHook', method=dict(type='frozen'))]
