_base_ = ['./depth_swin-base_full_8xb3-25k_nyu.py', '../_base_/peft/frozen.py']
