# iCoN with learned kernels that are the same for all inputs: the counterpart without input conditioning.
custom_hooks = [dict(type='PEFTHook', method=dict(type='icon-static', bottleneck=64))]
