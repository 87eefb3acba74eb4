"""Feed damaged and hostile files to all that reads files, and see that each is one clear error.

    python tests/fuzz_files.py --files 2000 --out work_dirs/fuzz

Adapter files, training checkpoints and pickled checkpoints are damaged at random, or rewritten with hostile metadata
and a checksum that fits. A file counts as

- executed: code out of it ran, by the mark that it leaves, or a process, a socket or a module was asked for;
- elsewhere: another file was opened, changed or removed than the one that was named on the command line;
- unclear: an error of another kind than the documented ones, one that does not name the file, is long or of many lines;
- wrong: it was taken, though its content is not that of the original;
- slow: it took more than 20 s.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import struct
import sys
import tarfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
for folder in (TESTS, TESTS / 'engine', TESTS / 'checkpoint'):
    sys.path.insert(0, str(folder))

import safetensors  # noqa: E402
import torch  # noqa: E402
from mmengine.hooks import Hook, runtime_info_hook  # noqa: E402
from mmengine.logging import HistoryBuffer  # noqa: E402
from mmengine.runner import Runner  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tiny_runs import config  # noqa: E402

from iconformer_mm import load_adapter  # noqa: E402
from iconformer_mm.checkpoint import (  # noqa: E402
    AdapterFileError,
    DamagedFileError,
    load_safetensors,
    read_safetensors,
    reading,
)
from iconformer_mm.checkpoint.reading import UntrustedFileError, guard_loading, read_checkpoint  # noqa: E402
from iconformer_mm.checkpoint.safetensors_io import CHECKSUM, checksum  # noqa: E402
from iconformer_mm.cli.adapter import main as adapter_tool  # noqa: E402
from iconformer_mm.engine import build_runner  # noqa: E402
from iconformer_mm.tuning import WeightsError, get_injection, remove  # noqa: E402

DOCUMENTED = (AdapterFileError, DamagedFileError, UntrustedFileError, WeightsError, FileNotFoundError)
# What Python and the libraries read for themselves.
OWN = ('/proc/', '/sys/', '/dev/', sys.prefix, sys.base_prefix, str(TESTS.parent), os.path.dirname(os.__file__))
EXECUTES = ('os.system', 'os.exec', 'os.posix_spawn', 'os.spawn', 'subprocess.Popen', 'socket.', 'urllib.', 'pty.')
REMOVES = ('os.remove', 'os.rmdir', 'os.rename', 'os.link', 'os.symlink', 'os.truncate', 'shutil.rmtree', 'os.chmod')


class Watch:
    """Sees by Python's audit events which files are opened while it is on.

    Args:
        out: The folder of the fuzzing; what is beside the files that are looked at is bait.
    """

    def __init__(self, out: Path) -> None:
        self.out = str(out)
        self.allowed: tuple[str, ...] | None = None
        self.executed: list[str] = []
        self.elsewhere: list[str] = []
        sys.addaudithook(self._see)
        opener = safetensors.safe_open  # which opens in Rust, unseen

        def seen(filename: Any, *args: Any, **kwargs: Any) -> Any:
            self._see('open', (filename, 'r', 0))
            return opener(filename, *args, **kwargs)

        safetensors.safe_open = seen

    def _see(self, event: str, arguments: tuple) -> None:
        if self.allowed is None:
            return
        if event.startswith(EXECUTES):
            self.executed.append(f'{event} {arguments!r:.200}')
        elif event == 'open' or event.startswith(REMOVES):
            path = arguments[0]
            if isinstance(path, int) or path is None:
                return
            path = os.path.abspath(os.fsdecode(path))
            if not path.startswith((*OWN, *self.allowed)):
                self.elsewhere.append(f'{event} {path}')

    @contextlib.contextmanager
    def on(self, *allowed: Path) -> Iterator[None]:
        """Within it, only these files and what is in these folders may be opened."""
        self.allowed = tuple(map(str, allowed))
        try:
            yield
        finally:
            self.allowed = None


class Stop(Exception):
    """A run has taken its checkpoint over."""


class StopHook(Hook):
    """Ends a run when its training would begin."""

    priority = 'LOWEST'

    def before_train(self, runner: Any) -> None:
        raise Stop


class Subject:
    """The files that are damaged, the bait, and what reads them.

    Args:
        out: Folder for all of it.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.mark = out / 'executed'
        self.work = out / 'work'
        self.bait = out / 'bait'
        self.bait.mkdir(parents=True)
        for name in ('base.pth', 'base.safetensors', 'code.py', 'best_x.safetensors', 'epoch_1.safetensors'):
            (self.bait / name).write_bytes(pickle.dumps(Evil(self.mark)))
        (self.bait / 'code.py').write_text(f'open({str(self.mark)!r}, "w")')
        (out / 'link.pth').symlink_to(self.bait / 'base.pth')
        self.paths = [
            *map(str, self.bait.iterdir()),
            str(out / 'link.pth'),
            '../bait/base.pth',
            os.path.relpath(self.bait / 'base.pth'),
            'http://127.0.0.1:9/base.pth',
            'https://127.0.0.1:9/base.pth',
            'file:///etc/passwd',
            f'file://{self.bait}/base.pth',
            's3://bucket/base.pth',
            'open-mmlab://resnet50',
            'torchvision://resnet50',
            '~/.bashrc',
            '~root/.bashrc',
            '/proc/self/environ',
            '/etc/passwd',
            '\\\\127.0.0.1\\share\\base.pth',
            'x\0y',
            '..',
            '',
            'x' * 5000,
            '{}',
            '{0.__class__.__mro__}',
            '%s%s%n',
            '$(touch executed)',
        ]
        training = self.runner(out / 'original')
        training.train()
        self.originals = {
            'adapter': out / 'original' / 'adapter.safetensors',
            'checkpoint': out / 'original' / 'epoch_1.safetensors',
            'pickle': out / 'original.pth',
        }
        state = {n: v for n, v in training.model.state_dict().items() if 'adapter' not in n}
        hub = dict(log_scalars=dict(loss=HistoryBuffer([1.0], [1])), runtime_info={}, resumed_keys={})
        torch.save(dict(meta=dict(epoch=1), state_dict=state, message_hub=hub), self.originals['pickle'])
        self.model = self.runner(self.work).model
        self.model.init_weights()
        self.before = {name: value.clone() for name, value in self.model.state_dict().items()}
        guard_loading()

    def runner(self, work_dir: Path, resume: bool = False, load_from: Path | None = None) -> Any:
        """A run of one epoch; with ``load_from`` it ends where its training would begin."""
        cfg = config(work_dir)
        cfg.default_hooks = dict(checkpoint=dict(type='AdapterCheckpointHook', interval=1, max_keep_ckpts=2))
        cfg.train_cfg.max_epochs = 1
        cfg.resume, cfg.load_from = resume, load_from and str(load_from)
        cfg.experiment_name = uuid.uuid4().hex
        cfg.log_level = 'ERROR'
        return build_runner(cfg)

    # Each of these returns what is to be watched; what it needs is made before.

    def read_adapter(self, path: Path) -> Reading:
        """As a program loads an adapter file."""

        def read() -> State:
            load_adapter(self.model, path)
            return read_safetensors(path)[1]

        return read

    def read_checkpoint(self, path: Path) -> Reading:
        """As MMEngine reads it."""
        return lambda: load_safetensors(str(path))['state_dict']

    def resume(self, path: Path) -> Reading:
        """As ``--resume FILE`` takes a checkpoint over."""
        runner = self.runner(self.work, resume=True, load_from=path)
        runner.register_hook(StopHook())

        def read() -> State:
            with contextlib.suppress(Stop):
                runner.train()
            return load_safetensors(str(path))['state_dict']

        return read

    def test(self, path: Path) -> Reading:
        """As ``tools/test.py`` takes a checkpoint over."""
        runner = self.runner(self.work, load_from=path)

        def read() -> State:
            runner.call_hook('before_run')
            runner.load_or_resume()
            return load_safetensors(str(path))['state_dict']

        return read

    def tool(self, path: Path) -> Reading:
        """As the commands of ``adapter.py`` read a file; an error of theirs has a status and a message."""

        def read() -> None:
            for command in (['info'], ['verify'], ['diff', str(path)], ['extract', str(self.work / 'out.safetensors')]):
                out = io.StringIO()
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
                    status = adapter_tool([command[0], str(path), *command[1:], '--json'])
                if status not in (0, 1):
                    raise DamagedFileError(json.loads(out.getvalue().splitlines()[-1])['error'])

        return read

    def read_pickle(self, path: Path) -> Reading:
        """As the tools read a checkpoint of others, by either reader."""

        def read() -> None:
            for load in (reading._load_weights, reading._load_restricted):
                reading._load_safely = load
                read_checkpoint(path)

        return read

    def readers(self, kind: str) -> list[Callable[[Path], Reading]]:
        """What reads a kind of file."""
        return {
            'adapter': [self.read_adapter, self.tool],
            'checkpoint': [self.read_checkpoint, self.resume, self.test, self.tool],
            'pickle': [self.read_pickle],
        }[kind]

    def restore(self) -> bool:
        """Whether the model is as it was, or adapted by a file that was taken; it is as it was then."""
        if get_injection(self.model) is not None:
            remove(self.model)
            self.model.load_state_dict(self.before)
        return same(self.model.state_dict(), self.before)


class Evil:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path, how: int = 0) -> None:
        self.mark, self.how = str(mark), how

    def __reduce__(self) -> tuple:
        return [
            (os.system, (f'touch {self.mark}',)),
            (exec, (f'open({self.mark!r}, "w")',)),
            (open, (self.mark, 'w')),
            (eval, (f'open({self.mark!r}, "w")',)),
            (getattr, (shutil.copy, '__globals__')),
            (shutil.copy, (__file__, self.mark)),
        ][self.how]


State = dict[str, torch.Tensor]
Reading = Callable[[], 'State | None']
Damage = Callable[[Path, random.Random, Subject], None]


# Bytes


def truncate(path: Path, rng: random.Random, _: Subject) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def flip(path: Path, rng: random.Random, _: Subject) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 3, 20])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def flip_header(path: Path, rng: random.Random, _: Subject) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(400)] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def zero(path: Path, rng: random.Random, _: Subject) -> None:
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content))
    length = min(rng.randrange(1, 4096), len(content) - start)
    content[start : start + length] = bytes(length)
    path.write_bytes(content)


def append(path: Path, rng: random.Random, _: Subject) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randrange(1, 100)))


def noise(path: Path, rng: random.Random, _: Subject) -> None:
    path.write_bytes(rng.randbytes(rng.randrange(2000)))


def no_file(path: Path, rng: random.Random, _: Subject) -> None:
    path.unlink()
    how = rng.randrange(4)
    if how == 0:
        path.mkdir()
    elif how == 1:
        path.symlink_to(path)
    elif how == 2:
        path.symlink_to(path.with_name('nowhere'))
    else:
        os.mkfifo(path)


def link_to_pickle(path: Path, rng: random.Random, subject: Subject) -> None:
    target = path.with_suffix('.pickled')
    target.write_bytes(pickle.dumps(Evil(subject.mark, rng.randrange(6))))
    path.unlink()
    path.symlink_to(target)


def evil_pickle(path: Path, rng: random.Random, subject: Subject) -> None:
    evil = Evil(subject.mark, rng.randrange(6))
    if rng.random() < 0.7:
        torch.save(dict(state_dict=dict(x=evil), meta=evil), path, _use_new_zipfile_serialization=rng.random() < 0.5)
    else:
        path.write_bytes(pickle.dumps(evil, protocol=rng.randrange(6)))


# The header of a safetensors file


def write_header(path: Path, header: str | bytes, content: bytes = bytes(64)) -> None:
    header = header if isinstance(header, bytes) else header.encode()
    path.write_bytes(struct.pack('<Q', len(header)) + header + content)


def huge_header(path: Path, rng: random.Random, _: Subject) -> None:
    length = rng.choice([2**31, 2**40, 2**62, 2**64 - 1])
    path.write_bytes(struct.pack('<Q', length) + path.read_bytes()[8:])


def absurd_shape(path: Path, rng: random.Random, _: Subject) -> None:
    shape = rng.choice(
        [
            [2**34],
            [2**50],
            [2**62],
            [2**64],
            [-1],
            [1.5],
            ['x'],
            None,
            'x',
            [2**32, 2**32],
            [0] * 200,
            [1] * 5000,
            [[4]],
        ]
    )
    size = shape[0] if isinstance(shape, list) and shape and isinstance(shape[0], int) else 4
    offsets = rng.choice([[0, 4 * size], [0, 16], [16, 0], [-4, 4], [0, 2**63], [0], None, [8, 24]])
    kind = rng.choice(['F32', 'F32', 'F8_E4M3', 'C64', 'X', 3, None])
    write_header(path, json.dumps({'x': dict(dtype=kind, shape=shape, data_offsets=offsets)}))


def absurd_header(path: Path, rng: random.Random, _: Subject) -> None:
    tensor = '"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'
    write_header(
        path,
        rng.choice(
            [
                '',
                '[]',
                'null',
                '{}',
                '[' * 100_000,
                '{"a":' * 50_000,
                f'{{{tensor},{tensor}}}',
                f'{{"__metadata__":{{"iconformer_mm":"{{}}"}},"__metadata__":{{"iconformer_mm":"x"}},{tensor}}}',
                f'{{"__metadata__":{{"iconformer_mm":1}},{tensor}}}',
                f'{{"__metadata__":[],{tensor}}}',
                f'{{"__metadata__":{{"iconformer_mm":"{"[" * 100_000}"}},{tensor}}}',
                f'{{"__metadata__":{{"checksum":"0"}},{tensor}}}',
                b'{"\xff\xfe":1}',
                '{"x":NaN}',
                '{"__metadata__":{"' + 'k' * 1_000_000 + '":"v"}}',
            ]
        ),
    )


# The metadata, with a checksum that fits


def resign(path: Path, change: Callable[[str, dict[str, torch.Tensor]], str]) -> None:
    """Rewrite the JSON of a file of ours, and give it the checksum that goes with it."""
    metadata, tensors = read_safetensors(path)
    (key,) = [key for key, value in metadata.items() if value.startswith('{')]
    metadata = {key: change(metadata[key], tensors)}
    metadata[CHECKSUM] = checksum(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


def places(content: Any) -> list[tuple[Any, Any]]:
    """Every container in a nest, with each of its keys."""
    found, left = [], [content]
    while left:
        node = left.pop()
        items = list(node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ())
        found += [(node, key) for key, _ in items]
        left += [value for _, value in items]
    return found


def named(path: Path) -> list[str]:
    """Keys of a file's content that mean something to those who read it."""
    return (
        ['method', 'sites', 'base_fingerprint', 'base_parameters', 'format_version', 'task', 'classes', 'notes']
        + ['load_from', 'rank_states', 'gradients', 'random', 'python', 'numpy', 'torch', 'version', 'meta', 'epoch']
        + ['iter', 'seed', 'cfg', 'message_hub', 'runtime_info', 'log_scalars', 'resumed_keys', 'keep_ckpt_ids']
        + ['last_ckpt', 'best_ckpt', 'best_score', 'optimizer', 'param_groups', 'state', 'param_schedulers']
        + ['dataset_meta', 'classes', 'state_dict', 'type', 'bottleneck', 'lr', 'betas', 'place', '$', 'tree', 'items']
        + ['experiment_name', 'time', 'max_length', 'values', 'counts', 'iconformer_mm']
    )


def pick(path: Path, content: Any, rng: random.Random) -> tuple[Any, Any]:
    """A place in the content: as often one with a name that means something as any."""
    found = places(content)
    known = [pair for pair in found if pair[1] in named(path)]
    return rng.choice(known if known and rng.random() < 0.7 else found)


def hostile_value(rng: random.Random, subject: Subject) -> Any:
    nested: Any = 'x'
    for _ in range(rng.choice([5, 300, 600])):
        nested = rng.choice([[nested], {'k': nested}])
    return rng.choice(
        [None, True, False, 0, -1, 3, 2**31, 2**63, 2**70, 10**300, 1.5, -0.0, float('nan'), float('inf'), 1e308]
        + [
            '',
            'x',
            'nan',
            '0',
            '__class__',
            'os.system',
            'builtins.exec',
            '\ud800',
            'x' * 200_000,
            '\u202e\n\x1b[31m',
        ]
        + [[], {}, [None], [[]], {'': ''}, {'$': 'tensor', 'place': 'nowhere'}, {'$': 'x'}, {'$': 3}, {'$': []}, nested]
        + [{'$': 'list_array', 'dtype': 'V9999999999', 'items': ['x']}, {'$': 'list_array', 'dtype': 'O', 'items': []}]
        + [{'$': 'list_array', 'dtype': 'U400000000', 'items': ['x'] * 9}, {'$': 'float', 'value': '1e999999'}]
        + [{'$': 'history', 'values': [1], 'counts': [], 'max_length': 1}, {'$': 'set', 'items': [[1]]}]
        + [{'$': 'history', 'values': [], 'counts': [], 'max_length': {'$': 'float', 'value': 'inf'}}]
        + [{'$': 'dict', 'items': [[[1], 2]]}, {'$': 'dict', 'items': [[1, 2], [1, 3]]}, {'$': 'dict', 'items': 5}]
        + [{'type': 'Pretrained', 'checkpoint': str(subject.bait / 'base.pth')}, {'type': 'os.system', 'command': 'x'}]
        + [list(range(10_000))]
    )


def wrong_value(path: Path, rng: random.Random, subject: Subject) -> None:
    def change(text: str, _: Any) -> str:
        content = json.loads(text)
        for _number in range(rng.choice([1, 1, 2, 5])):
            node, key = pick(path, content, rng)
            node[key] = hostile_value(rng, subject)
        return json.dumps(content)

    resign(path, change)


def missing_key(path: Path, rng: random.Random, _: Subject) -> None:
    def change(text: str, _tensors: Any) -> str:
        content = json.loads(text)
        node, key = pick(path, content, rng)
        del node[key]
        return json.dumps(content)

    resign(path, change)


def foreign_path(path: Path, rng: random.Random, subject: Subject) -> None:
    """Paths and URLs wherever a text is, and where MMEngine looks for some."""

    def change(text: str, _: Any) -> str:
        content = json.loads(text)
        texts = [(node, key) for node, key in places(content) if isinstance(node[key], (str, type(None)))]
        known = [(node, key) for node, key in texts if key in ('load_from', 'last_ckpt', 'cfg', 'experiment_name')]
        for node, key in [*rng.sample(texts, 1), *rng.sample(known, min(len(known), rng.randrange(3)))]:
            node[key] = rng.choice(subject.paths)
        tree = content.get('tree')
        if tree is not None:
            for key in ('best_ckpt', 'last_ckpt', 'best_ckpt_x'):
                tree['message_hub']['runtime_info'][key] = rng.choice(subject.paths)
            tree['message_hub']['runtime_info']['keep_ckpt_ids'] = rng.choice(
                [['../bait/base', '../../bait/code', 'x'], [1, 2, 3, 4], 'abc', [None] * 9]
            )
            tree['iconformer_mm']['load_from'] = rng.choice(subject.paths)
            if rng.random() < 0.5:
                tree['iconformer_mm']['base_fingerprint'] = '0' * 64
            tree['meta']['config'] = f'open({str(subject.mark)!r}, "w")'
        return json.dumps(content)

    resign(path, change)


def broken_json(path: Path, rng: random.Random, subject: Subject) -> None:
    """Text that is no JSON, or JSON that readers understand differently."""
    key = rng.choice(['method', 'base_fingerprint', 'version', 'format_version', 'state_dict', 'type', 'load_from'])
    how = rng.randrange(8)

    def change(text: str, _: Any) -> str:
        quoted = f'"{key}": '
        if how == 0:
            return text[: rng.randrange(1, len(text))]
        if how == 1 and quoted in text:
            return text.replace(quoted, f'"{key}": "{rng.choice(["x", "/etc/passwd"])}", {quoted}', 1)
        if how == 2:
            return text[:-1] + f', {quoted}{rng.choice(["NaN", "Infinity", "-Infinity", "1e999", "0x10"])}}}'
        if how == 3:
            return text[:-1] + ', "x": ' + '[' * 100_000 + ']' * 100_000 + '}'
        if how == 4:
            return text[:-1] + ', "x": ' + '{"a":' * 990 + '1' + '}' * 990 + '}'
        if how == 5:
            return text[:-1] + f', "x": {"9" * rng.choice([400, 100_000])}}}'
        if how == 6:
            return text[:-1] + ', "x": "' + 'y' * 5_000_000 + '"}'
        return '{' + rng.choice(['', 'a', '}', '"a": }', '"a": 1,,}', "'a': 1}", '"a": "\\ud800"}'])

    resign(path, change)


def hostile_method(path: Path, rng: random.Random, subject: Subject) -> None:
    option, value = rng.choice(
        [('bottleneck', 10**9), ('bottleneck', 10**18), ('kernel_size', 10**6 + 1), ('bottleneck', -1), ('x', 1)]
        + [('bottleneck', 'x'), ('kernel_size', 2), ('bottleneck', 1.5), ('scale', [[]]), ('input', 'x')]
        + [('type', 'os.system'), ('type', 'torch.hub.load'), ('type', 'mmengine.Runner'), ('__class__', 1), ('', 1)]
        + [('init_cfg', dict(type='Pretrained', checkpoint=str(subject.bait / 'base.pth'))), ('type', ['icon'])]
    )

    def change(text: str, _: Any) -> str:
        content = json.loads(text)
        (content['method'] if 'method' in content else content['tree']['iconformer_mm']['method'])[option] = value
        return json.dumps(content)

    resign(path, change)


def wrong_tensor(path: Path, rng: random.Random, _: Subject) -> None:
    """A tensor of another name, shape or type."""
    how = rng.randrange(3)

    def change(text: str, tensors: dict[str, torch.Tensor]) -> str:
        name = rng.choice([n for n in sorted(tensors) if tensors[n].numel() > 1 and 'adapter' in n])
        value = tensors.pop(name)
        if how == 0:
            tensors[rng.choice([name.replace('.', '_', 1), name + '\n' * 50, '../' + name, 'x' * 10_000])] = value
        elif how == 1:
            tensors[name] = value.flatten()[:-1].clone()
        else:
            tensors[name] = value.to(rng.choice([torch.int64, torch.uint8, torch.bool]))
        return text

    resign(path, change)


# Pickles


def hostile_opcodes(path: Path, rng: random.Random, subject: Subject) -> None:
    """Programs of the pickle machine that reach for code by way of what is allowed."""
    touch = f'touch {subject.mark}'.encode()
    programs = [
        b"cposix\nsystem\n(S'" + touch + b"'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cbuiltins\ngetattr\n(cmmengine.logging.history_buffer\nHistoryBuffer\nS'__init__'\ntR.",
        b'\x80\x02cmmengine.logging.history_buffer\nHistoryBuffer\n}X\x04\x00\x00\x00meanc_codecs\nencode\nsb.',
        b"c__builtin__\ngetattr\n(c__builtin__\n__import__\nS'x'\ntR.",
        b'\x80\x02r\xff\xff\xff\x7f.',
        b'\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.',
        b'\x80\x02' + b']' * 100_000 + b'a' * 99_999 + b'.',
        b'\x80\x02cnumpy\nndarray\n(J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86tR.',
        b'\x80\x02c_codecs\nencode\n(X\x01\x00\x00\x00xX\x03\x00\x00\x00hextR.',
        b"ctorch.storage\n_load_from_bytes\n(S'x'\ntR.",
        b"cnumpy.core.multiarray\n_reconstruct\n(cbuiltins\nobject\n(I0\ntS'b'\ntR.",
        b'\x80\x02\x8a\xff' + b'\x00' * 300,
        b'P0\n.',
    ]
    program = rng.choice(programs)
    if rng.random() < 0.5:
        path.write_bytes(program)
        return
    import zipfile

    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('x/data.pkl', program)
        archive.writestr('x/version', '3\n')
        archive.writestr('x/byteorder', 'little')


def other_archive(path: Path, rng: random.Random, subject: Subject) -> None:
    """A TorchScript program, or a tar archive that would unpack elsewhere."""
    if rng.random() < 0.5:
        torch.jit.script(torch.nn.ReLU()).save(path)
        return
    with tarfile.open(path, 'w') as archive:
        for name in ('storages', 'tensors', 'pickle', f'../{subject.mark.name}'):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
        link = tarfile.TarInfo('storages')
        link.type, link.linkname = tarfile.SYMTYPE, str(subject.bait / 'base.pth')
        archive.addfile(link)


ANY = (truncate, flip, flip_header, zero, append, noise, no_file, link_to_pickle, evil_pickle)
HEADER = (huge_header, absurd_shape, absurd_header)
META = (wrong_value, wrong_value, wrong_value, missing_key, foreign_path, foreign_path, broken_json, hostile_method)
DAMAGES: dict[str, tuple[Damage, ...]] = {
    'adapter': (*ANY, *HEADER, *META, wrong_tensor),
    'checkpoint': (*ANY, *HEADER, *META, *META),
    'pickle': (*ANY, hostile_opcodes, hostile_opcodes, other_archive),
}
KINDS = ('adapter', 'checkpoint', 'checkpoint', 'adapter', 'pickle')
RESIGNED = {*META, wrong_tensor}


def try_file(subject: Subject, watch: Watch, seed: int) -> list[tuple[str, str]]:
    """Make a file and read it in all ways; what was not as it must be."""
    rng = random.Random(seed)
    kind = KINDS[seed % len(KINDS)]
    damage = DAMAGES[kind][seed // len(KINDS) % len(DAMAGES[kind])]
    original = subject.originals[kind]
    path = subject.out / 'files' / f'{seed}_{kind}_{damage.__name__}{original.suffix}'
    path.write_bytes(original.read_bytes())
    damage(path, rng, subject)
    faults = []
    refused = False
    for read in subject.readers(kind):
        # What MMEngine's loader refuses, a run refuses by the same words: one in ten is tried.
        if refused and kind == 'checkpoint' and read != subject.tool and seed % 50 > 4:
            continue
        where = f'{path.name} by {read.__name__}'
        reading_it = read(path)
        begin = time.monotonic()
        taken = False
        try:
            with watch.on(path, path.with_suffix('.pickled'), subject.work):
                state = reading_it()
            taken = True
        except Exception as error:
            refused = True
            text = str(error)
            if not isinstance(error, DOCUMENTED) or str(path) not in text or len(text) > 2000 or '\n' in text:
                faults.append(('unclear', f'{where}: {type(error).__name__}: {text[:300]!r}'))
        else:
            if state is not None and damage not in RESIGNED and not same(state, good_state(subject, kind)):
                faults.append(('wrong', where))
        adapted = get_injection(subject.model) is not None
        if not subject.restore() or (adapted and not taken):
            faults.append(('wrong', f'{where}: the model is changed'))
        if time.monotonic() - begin > 20:
            faults.append(('slow', where))
        faults += [('executed', f'{where}: {event}') for event in watch.executed]
        faults += [('elsewhere', f'{where}: {event}') for event in watch.elsewhere]
        watch.executed.clear()
        watch.elsewhere.clear()
        if subject.mark.exists():
            subject.mark.unlink()
            faults.append(('executed', f'{where}: the mark is there'))
    if not faults:
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    return faults


def good_state(subject: Subject, kind: str) -> dict[str, torch.Tensor]:
    """The tensors of an original."""
    if kind == 'adapter':
        return read_safetensors(subject.originals[kind])[1]
    return load_safetensors(str(subject.originals[kind]))['state_dict']


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; the status is 0 if every file was as it must be."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--files', type=int, default=2000)
    parser.add_argument('--first', type=int, default=0, help='seed of the first file (0)')
    parser.add_argument('--stride', type=int, default=1, help='distance of the seeds (1)')
    parser.add_argument('--out', type=Path, required=True)
    args = parser.parse_args(arguments)
    shutil.rmtree(args.out, ignore_errors=True)
    out = args.out.resolve()
    (out / 'files').mkdir(parents=True)
    # These ask the compiler and git.
    Runner._log_env = lambda *_: None
    runtime_info_hook.get_git_hash = lambda: ''
    subject = Subject(out)
    watch = Watch(out)
    bait = {path: path.read_bytes() for path in subject.bait.iterdir()}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.monotonic()
    count: Counter[str] = Counter(dict.fromkeys(('executed', 'elsewhere', 'unclear', 'wrong', 'slow'), 0))
    for index in range(args.files):
        faults = try_file(subject, watch, args.first + index * args.stride)
        count.update({kind for kind, _ in faults})
        for kind, text in faults:
            print(f'{kind}: {text}', flush=True)
    if {path: path.read_bytes() for path in subject.bait.iterdir()} != bait:
        count['elsewhere'] += 1
        print('elsewhere: the bait is changed')
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    result = ', '.join(f'{number} {kind}' for kind, number in count.items())
    print(f'{args.files} files in {time.monotonic() - begin:.0f} s: {result}; memory grew by {grown:.0f} MiB')
    return 1 if any(count.values()) else 0


if __name__ == '__main__':
    sys.exit(main())
