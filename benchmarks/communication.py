"""Compare the gradient bytes that data-parallel training exchanges per step: iCoN and full fine-tuning.

    python benchmarks/communication.py

The bytes are counted in the buckets that DistributedDataParallel passes to its communication hook.
"""

from __future__ import annotations

import tempfile

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from iconformer_mm import inject
from measure import build_model

CASES = {
    'ViT-B/16 backbone': ('cifar100/vit-base-p16-mae_full_8xb128-100e_cifar100.py', 224),
    'Swin-L backbone': ('ade20k/swin-large-in22k_upernet_full_8xb2-160k_ade20k-512x512.py', 128),
}


def exchanged_bytes(config: str, size: int, method: str) -> int:
    """Count the bytes of one step of a config's backbone."""
    backbone = build_model(config).backbone
    backbone.train()  # mmpretrain's train() returns None
    inject(backbone, method)
    wrapped = DistributedDataParallel(backbone)
    total = 0

    # Without annotations: torch checks them as objects, not as the texts they would be here.
    def count(state, bucket):  # type: ignore[no-untyped-def]
        nonlocal total
        total += bucket.buffer().nbytes
        future: torch.futures.Future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, count)
    sum(out.square().mean() for out in wrapped(torch.randn(1, 3, size, size))).backward()
    return total


def main() -> None:
    """Run the benchmark."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=0, world_size=1)
        print('| model | full (MiB) | iCoN (MiB) | ratio |\n|---|---:|---:|---:|')
        for name, (config, size) in CASES.items():
            full, icon = (exchanged_bytes(config, size, method) / 2**20 for method in ('full', 'icon'))
            print(f'| {name} | {full:,.1f} | {icon:,.1f} | {icon / full:.4f} |', flush=True)
        dist.destroy_process_group()


if __name__ == '__main__':
    main()
