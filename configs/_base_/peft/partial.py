# Trains the last block, as in Jia et al. (ECCV 2022).
custom_hooks = [dict(type='PEFTHook', method=dict(type='partial', num_blocks=1))]
