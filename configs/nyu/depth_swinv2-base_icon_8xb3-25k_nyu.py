_base_ = ['./depth_swinv2-base_full_8xb3-25k_nyu.py', '../_base_/peft/icon.py']
