"""Runs adapted models in several threads at once, and compares every output with that of a single thread.

    python tests/share_in_threads.py --threads 4 --calls 200

The base is compared bit by bit afterwards. The status is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch  # noqa: E402
from families import FAMILIES, flatten, image, stir  # noqa: E402

from iconformer_mm import inject  # noqa: E402
from iconformer_mm.registry import PEFT_METHODS  # noqa: E402

HOSTS = ('ViT', 'Swin', 'timm ViT')


def count_wrong(host: str, method: str, threads: int, calls: int) -> tuple[int, bool]:
    """How many outputs differ, and whether the model's tensors are what they were."""
    family = next(family for family in FAMILIES if family.name == host)
    torch.manual_seed(0)
    model = family.build()
    inject(model, method)
    stir(model)
    model.eval()
    inputs = [image(family.sizes[i % len(family.sizes)], batch=1, seed=i) for i in range(threads)]
    with torch.no_grad():
        expected = [flatten(model(x)) for x in inputs]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrong = [0] * threads

    def work(index: int) -> None:
        for _ in range(calls):
            try:
                with torch.no_grad():
                    found = flatten(model(inputs[index]))
                wrong[index] += not all(torch.equal(a, b) for a, b in zip(found, expected[index], strict=True))
            except Exception as error:  # counted like a wrong output
                wrong[index] += 1
                print(f'{host} {method}: {type(error).__name__}: {error}', flush=True)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    after = model.state_dict()
    return sum(wrong), after.keys() == state.keys() and all(torch.equal(t, state[n]) for n, t in after.items())


def main() -> None:
    """Run the tool."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--threads', type=int, default=4)
    parser.add_argument('--calls', type=int, default=200, help='calls of each thread')
    args = parser.parse_args()
    torch.set_num_threads(1)
    failures = 0
    for host in HOSTS:
        for method in sorted(PEFT_METHODS.module_dict):
            if method == 'vpt' and host == 'Swin':  # prompt tokens are for plain ViTs
                continue
            wrong, same = count_wrong(host, method, args.threads, args.calls)
            failures += wrong or not same
            print(f'{host}, {method}: {wrong} of {args.threads * args.calls} wrong, base same: {same}', flush=True)
    print(f'{failures} failures')
    sys.exit(bool(failures))


if __name__ == '__main__':
    main()
