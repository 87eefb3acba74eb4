"""Two hundred damaged and hostile files: a clear error each, no code run, no memory taken."""

import json
import os
import pickle
import random
import resource
import struct

import pytest
import torch
from safetensors.torch import save_file
from test_adapter_file import classifier, trained

from iconformer_mm import load_adapter, save_adapter
from iconformer_mm.checkpoint import AdapterFileError, DamagedFileError, load_safetensors, read_safetensors
from iconformer_mm.checkpoint.safetensors_io import CHECKSUM, checksum
from iconformer_mm.checkpoint.training_checkpoint import save_checkpoint

KEY = 'iconformer_mm'
NUMBER = 200


@pytest.fixture(scope='module')
def originals(tmp_path_factory):
    """An adapter file and a training checkpoint, as bytes."""
    folder = tmp_path_factory.mktemp('originals')
    torch.manual_seed(0)
    model = trained(bottleneck=8)
    save_adapter(model, folder / 'adapter.safetensors')
    hub = dict(log_scalars={}, runtime_info={}, resumed_keys={})
    save_checkpoint(
        dict(meta=dict(epoch=1, iter=1), state_dict=model.state_dict(), message_hub=hub),
        folder / 'checkpoint.safetensors',
    )
    return folder


class Evil:
    def __reduce__(self):
        return (os.system, (f'touch {os.environ["EVIL_MARK"]}',))


def rewrite(path, change):
    """Change an adapter file's metadata and tensors, and give it the checksum that goes with them."""
    metadata, tensors = read_safetensors(path)
    content = json.loads(metadata[KEY])
    content = change(content, tensors) or content
    metadata = {KEY: content if isinstance(content, str) else json.dumps(content)}
    metadata[CHECKSUM] = checksum(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


def truncate(path, rng):
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def flip(path, rng):
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 3, 20])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def flip_header(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.randrange(400)] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def append(path, rng):
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randrange(1, 100)))


def huge_header(path, rng):
    length = rng.choice([2**31, 2**40, 2**62, 2**64 - 1])
    path.write_bytes(struct.pack('<Q', length) + path.read_bytes()[8:])


def huge_tensor(path, rng):
    size = rng.choice([2**34, 2**50, 2**62])
    header = json.dumps({'x': dict(dtype='F32', shape=[size], data_offsets=[0, 4 * size])}).encode()
    path.write_bytes(struct.pack('<Q', len(header)) + header + bytes(16))


def noise(path, rng):
    path.write_bytes(rng.randbytes(rng.randrange(2000)))


def evil_pickle(path, rng):
    if rng.random() < 0.5:
        torch.save(dict(state_dict=dict(x=Evil()), meta=Evil()), path)
    else:
        path.write_bytes(pickle.dumps(Evil()))


def wrong_keys(path, rng):
    def change(content, tensors):
        name = rng.choice(sorted(tensors))
        tensors[name.replace('.', '_', 1)] = tensors.pop(name)

    rewrite(path, change)


def wrong_shape(path, rng):
    def change(content, tensors):
        name = rng.choice([n for n in sorted(tensors) if tensors[n].numel() > 1])
        tensors[name] = tensors[name].flatten()[:-1].clone()

    rewrite(path, change)


def wrong_type(path, rng):
    def change(content, tensors):
        name = rng.choice([n for n in sorted(tensors) if tensors[n].is_floating_point()])
        tensors[name] = tensors[name].to(rng.choice([torch.int64, torch.uint8, torch.bool]))

    rewrite(path, change)


def hostile_metadata(path, rng):
    values = [None, 3, 'x', [], {}, dict(type='os.system'), dict(type='icon', command='x'), 2**70, True]

    def change(content, tensors):
        if rng.random() < 0.5:
            content.pop(rng.choice(['method', 'sites', 'base_fingerprint', 'base_parameters', 'format_version']))
        else:
            content[rng.choice(['method', 'base_fingerprint', 'format_version'])] = rng.choice(values)

    rewrite(path, change)


def hostile_method(path, rng):
    option, value = rng.choice(
        [('bottleneck', 10**9), ('bottleneck', 10**18), ('kernel_size', 10**6 + 1), ('bottleneck', -1)]
        + [('bottleneck', 'x'), ('kernel_size', 2), ('bottleneck', 1.5), ('scale', [[]]), ('input', 'x')]
    )

    def change(content, tensors):
        content['method'][option] = value

    rewrite(path, change)


def deep_metadata(path, rng):
    rewrite(path, lambda content, tensors: '[' * 200_000)


ADAPTER_ONLY = (wrong_keys, wrong_shape, wrong_type, hostile_metadata, hostile_method, deep_metadata)
ANY = (truncate, flip, flip_header, append, huge_header, huge_tensor, noise, evil_pickle)


def test_two_hundred_bad_files(originals, tmp_path, monkeypatch):
    mark = tmp_path / 'executed'
    monkeypatch.setenv('EVIL_MARK', str(mark))
    model = classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    harmless = 0
    for seed in range(NUMBER):
        rng = random.Random(seed)
        damage = (ADAPTER_ONLY + ANY)[seed % len(ADAPTER_ONLY + ANY)]
        kind = 'adapter' if damage in ADAPTER_ONLY else rng.choice(['adapter', 'checkpoint'])
        path = tmp_path / f'{seed}_{damage.__name__}.safetensors'
        path.write_bytes((originals / f'{kind}.safetensors').read_bytes())
        damage(path, rng)
        expected = (AdapterFileError, DamagedFileError)
        try:
            if kind == 'adapter':
                load_adapter(model, path)
            else:
                load_safetensors(str(path))
        except expected as error:
            assert str(path) in str(error) and len(str(error)) < 2000, path
            assert not isinstance(error, UnicodeError)
        else:
            # A bit may flip in the white space of the header.
            assert damage in (flip, flip_header), path
            metadata, tensors = read_safetensors(path)
            text, good = read_safetensors(originals / f'{kind}.safetensors')
            assert metadata == text and tensors.keys() == good.keys()
            assert all(torch.equal(value, good[name]) for name, value in tensors.items())
            harmless += 1
            model = classifier()
        assert model.state_dict().keys() == before.keys(), path
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), path
    assert harmless <= NUMBER // 50
    assert not mark.exists()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert grown < 200 * 1024, f'{grown / 1024:.0f} MiB'
