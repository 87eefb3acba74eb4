# LoRA (Hu et al., ICLR 2022) on the queries and values of attention.
custom_hooks = [dict(type='PEFTHook', method=dict(type='lora', rank=8, alpha=8, targets=['q', 'v']))]
