# Adapters (Houlsby et al., ICML 2019) after attention and FFN.
custom_hooks = [dict(type='PEFTHook', method=dict(type='adapter', bottleneck=64))]
