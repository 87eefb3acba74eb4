# GLIP Swin-T with fusion layers on COCO, closed set: MMDetection's fine-tuning recipe.
_base_ = ['mmdet::glip/glip_atss_swin-t_fpn_dyhead_16xb2_ms-2x_funtune_coco.py']

custom_imports = dict(imports=['iconformer_mm'], allow_failed_imports=False)

# Checkpointing of the fusion layers passes no gradient to layers before which nothing is trained.
model = dict(bbox_head=dict(use_checkpoint=False))
