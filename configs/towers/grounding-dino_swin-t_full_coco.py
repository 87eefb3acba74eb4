# MM-Grounding-DINO Swin-T on COCO, closed set: MMDetection's fine-tuning recipe.
_base_ = ['mmdet::mm_grounding_dino/coco/grounding_dino_swin-t_finetune_16xb4_1x_coco.py']

custom_imports = dict(imports=['iconformer_mm'], allow_failed_imports=False)

# Checkpointing of the encoder needs fairscale, and passes no gradient to layers before which nothing is trained.
model = dict(encoder=dict(num_cp=0))
