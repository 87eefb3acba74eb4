# iConFormer: input-conditioned adapters parallel to the attention of every block. The backbone is frozen.
custom_hooks = [dict(type='PEFTHook', method=dict(type='icon', bottleneck=64))]
