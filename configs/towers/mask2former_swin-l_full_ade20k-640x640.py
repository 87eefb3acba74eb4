# Mask2Former with Swin-L on ADE20K: MMSegmentation's recipe.
_base_ = ['mmseg::mask2former/mask2former_swin-l-in22k-384x384-pre_8xb2-160k_ade20k-640x640.py']

custom_imports = dict(imports=['iconformer_mm', 'mmdet.models'], allow_failed_imports=False)
