_base_ = ['./swin-large-in22k_upernet_full_8xb2-160k_ade20k-512x512.py', '../_base_/peft/icon.py']
