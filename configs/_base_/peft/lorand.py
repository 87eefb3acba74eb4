# LoRand (Yin et al., CVPR 2023): low-rank adapters after attention and FFN.
custom_hooks = [dict(type='PEFTHook', method=dict(type='lorand', kernel_dims=8, branches=2))]
