# DoRA (Liu et al., ICML 2024) on attention and FFN.
custom_hooks = [
    dict(type='PEFTHook', method=dict(type='dora', rank=16, alpha=32, targets=['q', 'k', 'v', 'fc1', 'fc2']))
]
