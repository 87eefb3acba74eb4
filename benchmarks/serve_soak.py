"""Serve eight adapters of two bases for minutes while everything changes, and count what goes wrong.

    python benchmarks/serve_soak.py --minutes 10 --out work_dirs/serve_soak

A small ViT serves five classifiers of different methods, and a tiny Swin three segmenters, as two applications of one
embedded Ray. Clients send images at random. Every 20 seconds an adapter is replaced by another version of it. A replica
is killed at one third and at two thirds of the time. Meanwhile hostile requests come in: truncated and huge images,
bombs, names with paths in them, wrong types.

Every answer is compared with the prediction of the same version of the adapter by ``AdapterInferencer``, computed
before. A request that fails with a connection error or a 5xx status is sent again. It is lost if that fails for 5
minutes.

The gain of batching is measured on the model alone: 64 images of the five classifiers, in batches of 16 and one by one.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import json
import os
import random
import shutil
import signal
import struct
import tempfile
import threading
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import requests
import torch
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope

from iconformer_mm import inject, save_adapter
from iconformer_mm.engine import load_config
from iconformer_mm.engine.config import build_model
from iconformer_mm.inference import AdapterInferencer
from iconformer_mm.inference.predictions import encode_prediction
from iconformer_mm.inference.ray_cluster import connected
from iconformer_mm.serving.folder import read_version
from iconformer_mm.serving.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {
    'vit': ROOT / 'configs' / 'quickstart' / 'vit-quickstart_icon_digits.py',
    'swin': ROOT / 'configs' / 'scenes' / 'upernet_swin-scenes_icon_target.py',
}
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    'vit': {
        'icon': dict(type='icon', bottleneck=16),
        'adaptformer': dict(type='adaptformer', bottleneck=16),
        'lora': dict(type='lora'),
        'convpass': dict(type='convpass'),
        'houlsby': dict(type='adapter', bottleneck=8),
    },
    'swin': {
        'icon': dict(type='icon', bottleneck=16),
        'adaptformer': dict(type='adaptformer', bottleneck=16),
        'mona': dict(type='mona'),
    },
}
NUM_IMAGES = 8
PATIENCE_S = 300.0  # before a request is counted as lost; a replica takes that long to start on a busy machine
TIMEOUT_S = 60.0
STALE_S = 5.0  # after which an answer must be of the new version
SCORE_TOLERANCE = 1e-4
PIXEL_TOLERANCE = 1e-3  # share of pixels whose class may differ where two are equal up to rounding


def make_version(base: str, method: dict[str, Any], seed: int, path: Path) -> None:
    """Write an adapter with random values, as if it had been trained."""
    cfg = load_config(str(CONFIGS[base]))
    init_default_scope(cfg.default_scope)
    torch.manual_seed(seed)
    model = build_model(cfg)
    model.init_weights()
    inject(model, method)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_adapter(model, path)


def make_images(base: str) -> list[np.ndarray]:
    """Images (H, W, 3): noise with structure, so that predictions differ."""
    generator = np.random.default_rng(7)
    size = (28, 28) if base == 'vit' else (96, 128)
    images = []
    for _ in range(NUM_IMAGES):
        coarse = generator.integers(0, 255, (6, 8, 3), dtype=np.uint8)
        images.append(cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC))
    return images


@dataclasses.dataclass
class Adapter:
    """An adapter that is served, with its versions."""

    base: str
    name: str
    files: list[Path]
    versions: list[str]
    current: int = 0
    replaced: float = 0.0  # when the current version came


class Truth:
    """The predictions of every version on every image."""

    def __init__(self, images: dict[str, list[np.ndarray]], adapters: list[Adapter]) -> None:
        self._answers: dict[tuple[str, int], dict[str, Any]] = {}
        for adapter in adapters:
            for version, file in zip(adapter.versions, adapter.files):
                inferencer = AdapterInferencer(str(CONFIGS[adapter.base]), file, device='cpu')
                for index, image in enumerate(images[adapter.base]):
                    sample = inferencer([image])[0].cpu()
                    self._answers[version, index] = encode_prediction(sample, inferencer.classes, top_k=10)

    def agrees(self, answer: dict[str, Any], index: int) -> bool:
        """Whether an answer is the prediction of the version that it names."""
        truth = self._answers.get((answer['version'], index))
        if truth is None or truth['task'] != answer['task']:
            return False
        if truth['task'] == 'classification':
            expected, actual = (
                {each['label']: each['score'] for each in content['labels']} for content in (truth, answer)
            )
            return expected.keys() == actual.keys() and all(
                abs(expected[label] - actual[label]) < SCORE_TOLERANCE for label in expected
            )
        expected_map, actual_map = (_read_map(content['map']['png']) for content in (truth, answer))
        return expected_map.shape == actual_map.shape and float((expected_map != actual_map).mean()) <= PIXEL_TOLERANCE


def _read_map(text: str) -> np.ndarray:
    read = cv2.imdecode(np.frombuffer(base64.b64decode(text), np.uint8), cv2.IMREAD_UNCHANGED)
    if read is None:
        raise ValueError('the map is no PNG')
    return read


class Counts:
    """What happened, counted by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.numbers: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.notes: list[str] = []

    def add(self, what: str, note: str | None = None) -> None:
        """Count something."""
        with self._lock:
            self.numbers[what] += 1
            if note is not None and len(self.notes) < 50:
                self.notes.append(f'{what}: {note[:300]}')

    def took(self, seconds: float) -> None:
        """Keep the time of an answer at the first try."""
        with self._lock:
            self.seconds.append(seconds)


def send(counts: Counts, **request: Any) -> requests.Response | None:
    """Send a request until it is answered with less than 500; None if it is lost."""
    end = time.monotonic() + PATIENCE_S
    tries = 0
    while time.monotonic() < end:
        tries += 1
        try:
            response = requests.post(timeout=TIMEOUT_S, **request)
        except requests.RequestException as error:
            counts.add('sent again', type(error).__name__)
        else:
            if response.status_code < 500 and response.status_code != 429:
                return response
            counts.add('sent again', f'{response.status_code} {response.text}')
        time.sleep(0.3)
    return None


def ask(
    url: str, adapters: list[Adapter], images: dict[str, list[np.ndarray]], truth: Truth, counts: Counts, seed: int,
    stop: threading.Event,
) -> None:  # fmt: skip
    """Send images at random, and check the answers."""
    chosen = random.Random(seed)
    bodies = {base: [cv2.imencode('.png', image)[1].tobytes() for image in each] for base, each in images.items()}
    while not stop.is_set():
        adapter, index = chosen.choice(adapters), chosen.randrange(NUM_IMAGES)
        began = time.monotonic()
        before = counts.numbers['sent again']
        request: dict[str, Any] = dict(url=f'{url}/{adapter.base}/v1/predict/{adapter.name}')
        if chosen.random() < 0.5:
            request.update(
                data=bodies[adapter.base][index], headers={'Content-Type': 'image/png'}, params=dict(top_k=10)
            )
        else:
            text = base64.b64encode(bodies[adapter.base][index]).decode()
            request.update(json=dict(image=text, options=dict(top_k=10)))
        response = send(counts, **request)
        if response is None:
            counts.add('lost', adapter.name)
            continue
        if counts.numbers['sent again'] == before:
            counts.took(time.monotonic() - began)
        if response.status_code != 200:
            counts.add('refused', f'{response.status_code} {response.text}')
            continue
        answer = response.json()
        current, replaced = adapter.versions[adapter.current], adapter.replaced
        counts.add('served')
        if not truth.agrees(answer, index):
            counts.add('wrong', f'{adapter.base} {adapter.name} {answer["version"]} image {index}')
        elif answer['version'] != current and began > replaced + STALE_S:
            counts.add('stale', f'{adapter.base} {adapter.name} {answer["version"]}')


def replace(
    adapters: list[Adapter], folders: dict[str, Path], every_s: float, counts: Counts, stop: threading.Event
) -> None:
    """Replace one adapter after another by its other version."""
    turn = 0
    while not stop.wait(every_s):
        adapter = adapters[turn % len(adapters)]
        turn += 1
        other = 1 - adapter.current
        new = folders[adapter.base] / 'new'
        shutil.copy(adapter.files[other], new)
        os.replace(new, folders[adapter.base] / f'{adapter.name}.safetensors')
        adapter.replaced, adapter.current = time.monotonic(), other
        counts.add('replaced')


def replicas() -> dict[str, psutil.Process]:
    """The processes of the replicas below this one, by their application."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            title = (process.cmdline() or [''])[0]
            if title.startswith('ray::ServeReplica:'):
                found[title.split(':')[3]] = process
        except psutil.Error:
            continue
    return found


def bomb(width: int, height: int) -> bytes:
    """A small PNG that says it unfolds to this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    body = chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(bytes(3 * width + 1))) + chunk(b'IEND', b'')
    return b'\x89PNG\r\n\x1a\n' + body


NAMES = ('..%2f..%2fetc%2fpasswd', '%2e%2e', '..', 'icon.safetensors', '%00', 'icon%00', 'x' * 999)
DOCUMENTS = (b'{', b'[' * 50_000, b'null', b'"x"', b'{"image": [1]}', b'\xff', b'{"image": "AA", "x": 1}')
OPTIONS: tuple[dict[str, Any], ...] = (
    {'score': 'high'},
    {'top_k': -1},
    {'top_k': 10**30},
    {'maps': []},
    {'file': '/etc/passwd'},
)


def hostile_request(kind: int, chosen: random.Random, good: bytes) -> dict[str, Any]:
    """A request that must be refused with a 4xx status, of one of ten kinds."""
    path, data, content = '/vit/v1/predict/icon', good, 'image/png'
    if kind == 0:
        data = good[: chosen.randrange(1, len(good) - 12)]
    elif kind == 1:
        data = bytes(chosen.getrandbits(8) for _ in range(chosen.randrange(1, 500)))
    elif kind == 2:
        data = bytes(1_200_000)
    elif kind == 3:
        side = chosen.choice([20_000, 60_000, 2**20])
        data = bomb(side, chosen.choice([side, 2**31 - 1]))
    elif kind == 4:
        name = chosen.choice(
            ['..%2f..%2fetc%2fpasswd', '%2e%2e', '..', 'icon.safetensors', '%00', 'icon%00', 'x' * 999]
        )
        path = f'/vit/v1/predict/{name}'
    elif kind == 5:
        content = chosen.choice(['text/html', 'application/xml', 'multipart/form-data', 'application/pdf', ''])
    elif kind == 6:
        content = 'application/json'
        data = chosen.choice(
            [b'{', b'[' * 50_000, b'null', b'"x"', b'{"image": [1]}', b'\xff', b'{"image": "AA", "x": 1}']
        )
    elif kind == 7:
        content = 'application/json'
        text = base64.b64encode(good).decode()
        options = chosen.choice(
            [{'score': 'high'}, {'top_k': -1}, {'top_k': 10**30}, {'maps': []}, {'file': '/etc/passwd'}]
        )
        data = json.dumps(dict(image=text, options=options)).encode()
    elif kind == 8:
        content = 'application/json'
        data = json.dumps(dict(image=chosen.choice(['@@@', 'AAA', 'aGVsbG8=', 'data:image/png;base64,AA']))).encode()
    else:
        path += chosen.choice(['?score=2', '?top_k=none', '?nothing=1', '?score=nan'])
    return dict(path=path, data=data, headers={'Content-Type': content})


def attack(url: str, number: int, over_s: float, counts: Counts, stop: threading.Event) -> None:
    """Send hostile requests, evenly over the time."""
    chosen = random.Random(1)
    good = cv2.imencode('.png', make_images('vit')[0])[1].tobytes()
    for index in range(number):
        request = hostile_request(index % 10, chosen, good)
        response = send(counts, url=url + request.pop('path'), **request)
        if response is None:
            counts.add('hostile lost')
            continue
        try:
            code = response.json()['error']['code']
        except (ValueError, KeyError, TypeError):
            counts.add('hostile unclear', f'{index % 10}: {response.status_code} {response.text}')
            continue
        refused = 400 <= response.status_code < 500
        counts.add('hostile 4xx' if refused else 'hostile other', None if refused else f'{index % 10} {code}')
        if stop.wait(over_s / number):
            over_s = 0


def watch_memory(memory: dict[int, list[tuple[float, float]]], stop: threading.Event) -> None:
    """Note the resident memory of each replica, in MB, every two seconds."""
    began = time.monotonic()
    while not stop.wait(2):
        for process in replicas().values():
            try:
                memory[process.pid].append((time.monotonic() - began, process.memory_info().rss / 1e6))
            except psutil.Error:
                continue


def gain_of_batching(folder: Path, images: list[np.ndarray], rounds: int = 5) -> float:
    """How many times as fast the model is with batches of 16 as one by one, by the medians of alternating rounds."""
    from iconformer_mm.serving.model import Job, ServedModel

    model = ServedModel(Settings(str(CONFIGS['vit']), str(folder), device='cpu', threads=1))
    model.folder.scan()
    names = [entry.name for entry in model.folder.entries]
    jobs = [Job(names[index % len(names)], model.prepare(images[index % len(images)])) for index in range(64)]

    def timed(size: int) -> float:
        began = time.perf_counter()
        for start in range(0, len(jobs), size):
            model.predict(jobs[start : start + size])
        return time.perf_counter() - began

    timed(16)
    seconds = [(timed(1), timed(16)) for _ in range(rounds)]
    single, batched = (float(np.median(column)) for column in zip(*seconds))
    return single / batched


def growth(memory: dict[int, list[tuple[float, float]]]) -> list[dict[str, int]]:
    """Memory of each replica after its first 30 seconds and at its end, in MB."""
    grown = []
    for pid, samples in memory.items():
        settled = [mb for at, mb in samples if at > samples[0][0] + 30]
        if len(settled) >= 10:
            first, last = np.median(settled[:5]), np.median(settled[-5:])
            grown.append(dict(pid=pid, samples=len(samples), first_mb=round(float(first)), last_mb=round(float(last))))
    return grown


def main() -> None:
    """Run the soak, print what was counted, and write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--minutes', type=float, default=10)
    parser.add_argument('--clients', type=int, default=4)
    parser.add_argument('--hostile', type=int, default=1000)
    parser.add_argument('--replace-s', type=float, default=20, help='seconds between two replacements')
    parser.add_argument('--port', type=int, default=8765)
    parser.add_argument('--out', type=Path, default=Path('work_dirs/serve_soak'))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        results = soak(args, Path(folder))
    (args.out / 'results.json').write_text(json.dumps(results, indent=1) + '\n', encoding='utf-8')
    print(json.dumps(results, indent=1))


def soak(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Serve, disturb and count."""
    MMLogger.get_current_instance().setLevel('WARNING')
    images = {base: make_images(base) for base in CONFIGS}
    folders = {base: work / base for base in CONFIGS}
    adapters = []
    for base, methods in METHODS.items():
        folders[base].mkdir()
        for name, method in methods.items():
            files = [work / f'{base}-{name}-{seed}.safetensors' for seed in range(2)]
            for seed, file in enumerate(files):
                make_version(base, method, seed, file)
            adapters.append(Adapter(base, name, files, [read_version(file)[0] for file in files]))
            shutil.copy(files[0], folders[base] / f'{name}.safetensors')
    truth = Truth(images, adapters)
    print(f'{len(adapters)} adapters in 2 versions; measuring the gain of batching', flush=True)
    gain = round(gain_of_batching(folders['vit'], images['vit']), 2)
    with connected(num_cpus=4):
        return dict(gain_of_batching=gain, **serve_and_disturb(args, adapters, folders, images, truth))


def serve_and_disturb(
    args: argparse.Namespace,
    adapters: list[Adapter],
    folders: dict[str, Path],
    images: dict[str, list[np.ndarray]],
    truth: Truth,
) -> dict[str, Any]:
    """Serve both bases on the Ray that is connected, with clients and disturbances, and count."""
    from ray import serve

    from iconformer_mm.serving.deployment import build

    serve.start(http_options=dict(host='127.0.0.1', port=args.port))
    for base, config in CONFIGS.items():
        options = dict(config=str(config), adapters=str(folders[base]), device='cpu', threads=1, max_body_mb=1)
        serve.run(build(options), name=base, route_prefix=f'/{base}')
    url, total_s = f'http://127.0.0.1:{args.port}', args.minutes * 60
    counts, stop = Counts(), threading.Event()
    memory: dict[int, list[tuple[float, float]]] = defaultdict(list)
    work_of: list[tuple[Callable[..., None], tuple]] = [
        (ask, (url, adapters, images, truth, counts, seed, stop)) for seed in range(args.clients)
    ]
    work_of += [
        (replace, (adapters, folders, args.replace_s, counts, stop)),
        (attack, (url, args.hostile, total_s * 0.9, counts, stop)),
        (watch_memory, (memory, stop)),
    ]
    threads = [threading.Thread(target=target, args=arguments) for target, arguments in work_of]
    for thread in threads:
        thread.start()
    print('serving', flush=True)
    killed = 0
    began = time.monotonic()
    for share in (1 / 3, 2 / 3, 1):
        while time.monotonic() - began < share * total_s:
            time.sleep(1)
        if share < 1:
            base = list(CONFIGS)[killed]
            os.kill(replicas()[base].pid, signal.SIGKILL)
            killed += 1
            print(f'killed the replica of {base} after {time.monotonic() - began:.0f} s', flush=True)
    stop.set()
    for thread in threads:
        thread.join()
    for base in CONFIGS:
        serve.delete(base)
    serve.shutdown()
    seconds = np.array(counts.seconds)
    return dict(
        minutes=args.minutes,
        clients=args.clients,
        killed=killed,
        **{what: counts.numbers[what] for what in ('served', 'wrong', 'stale', 'lost', 'refused', 'sent again')},
        **{what: counts.numbers[what] for what in ('replaced', 'hostile 4xx', 'hostile other', 'hostile unclear')},
        **{'hostile lost': counts.numbers['hostile lost']},
        p50_ms=round(float(np.percentile(seconds, 50)) * 1000, 1),
        p99_ms=round(float(np.percentile(seconds, 99)) * 1000, 1),
        slowest_s=round(float(seconds.max()), 1),
        per_second=round(counts.numbers['served'] / total_s, 1),
        memory=growth(memory),
        notes=counts.notes,
    )


if __name__ == '__main__':
    main()
