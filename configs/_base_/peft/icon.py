# iConFormer: input-conditioned adapters beside the attention of every block, backbone frozen.
custom_hooks = [dict(type='PEFTHook', method=dict(type='icon', bottleneck=64))]
