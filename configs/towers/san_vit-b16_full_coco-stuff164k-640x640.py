# SAN with CLIP's ViT-B/16 on COCO-Stuff: MMSegmentation's recipe, which freezes CLIP and trains the network beside it.
# For own classes: model.text_encoder=dict(dataset_name=None, vocabulary=[...]) and model.decode_head.num_classes.
_base_ = ['mmseg::san/san-vit-b16_coco-stuff164k-640x640.py']

custom_imports = dict(imports=['iconformer_mm'], allow_failed_imports=False)
