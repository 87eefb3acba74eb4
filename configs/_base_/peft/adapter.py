# Adapters behind attention and FFN (Houlsby et al., ICML 2019).
custom_hooks = [dict(type='PEFTHook', method=dict(type='adapter', bottleneck=64))]
