_base_ = ['./vit-base-p16-mae_full_8xb128-100e_cifar100.py', '../_base_/peft/frozen.py']
