# iConFormer: input-conditioned adapters parallel to every FFN, backbone frozen.
custom_hooks = [dict(type='PEFTHook', method=dict(type='icon', bottleneck=64))]
