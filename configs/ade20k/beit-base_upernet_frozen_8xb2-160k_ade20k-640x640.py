_base_ = ['./beit-base_upernet_full_8xb2-160k_ade20k-640x640.py', '../_base_/peft/frozen.py']
