# Full fine-tuning: nothing is frozen.
custom_hooks = [dict(type='PEFTHook', method=dict(type='full'))]
