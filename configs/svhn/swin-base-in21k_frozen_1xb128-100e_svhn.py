_base_ = ['./swin-base-in21k_full_1xb128-100e_svhn.py', '../_base_/peft/frozen.py']

optim_wrapper = dict(optimizer=dict(lr=1e-3))
