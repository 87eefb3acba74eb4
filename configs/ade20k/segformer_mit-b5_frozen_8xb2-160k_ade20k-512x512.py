_base_ = ['./segformer_mit-b5_full_8xb2-160k_ade20k-512x512.py', '../_base_/peft/frozen.py']
