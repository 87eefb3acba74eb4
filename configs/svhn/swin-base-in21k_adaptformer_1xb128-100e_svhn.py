_base_ = ['./swin-base-in21k_full_1xb128-100e_svhn.py', '../_base_/peft/adaptformer.py']

optim_wrapper = dict(optimizer=dict(lr=1e-3))
