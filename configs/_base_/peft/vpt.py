# VPT-deep (Jia et al., ECCV 2022): prompt tokens in every block. Only for plain ViTs.
custom_hooks = [dict(type='PEFTHook', method=dict(type='vpt', num_tokens=10, deep=True))]
