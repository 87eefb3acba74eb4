_base_ = ['mmseg::swin/swin-base-patch4-window7-in22k-pre_upernet_8xb2-160k_ade20k-512x512.py']

custom_imports = dict(imports=['iconformer_mm'], allow_failed_imports=False)
