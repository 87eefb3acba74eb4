_base_ = ['./segformer_mit-b5_full_8xb2-160k_ade20k-640x640.py', '../_base_/peft/frozen.py']
