# iConFormer on Swin, LoRA on BERT, and on the encoder and decoder. All else is frozen.
_base_ = ['./grounding-dino_swin-b_full_coco.py', '../_base_/towers/grounding-dino_icon-lora.py']

# Adapters learn at five times the rate of full fine-tuning, in every tower.
optim_wrapper = dict(paramwise_cfg=dict(adapter_lr_mult=5))
