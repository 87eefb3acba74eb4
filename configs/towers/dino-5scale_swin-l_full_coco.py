# DINO with five scales and Swin-L on COCO: MMDetection's recipe.
_base_ = ['mmdet::dino/dino-5scale_swin-l_8xb2-12e_coco.py']

custom_imports = dict(imports=['iconformer_mm'], allow_failed_imports=False)
