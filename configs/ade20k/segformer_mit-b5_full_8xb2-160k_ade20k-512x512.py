_base_ = ['mmseg::segformer/segformer_mit-b5_8xb2-160k_ade20k-512x512.py']

custom_imports = dict(imports=['iconformer_mm'], allow_failed_imports=False)
