# iCoN with learned kernels, the same for all inputs: its twin without input conditioning.
custom_hooks = [dict(type='PEFTHook', method=dict(type='icon-static', bottleneck=64))]
