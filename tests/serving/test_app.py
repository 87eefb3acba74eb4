"""The web application in this process, against the inferencer on the same file."""

import base64
import io
import os
import re
import shutil
import struct
import time
import zlib
from contextlib import contextmanager

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from trained_adapters import DIGITS, SCENES, trained

from iconformer_mm.inference import AdapterInferencer
from iconformer_mm.serving.settings import Settings

pytest.importorskip('fastapi', reason='the extra [ray] is not installed')
pytestmark = pytest.mark.filterwarnings('ignore')


def picture(seed=0, size=(40, 48)):
    return np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)


def png(image):
    return cv2.imencode('.png', image)[1].tobytes()


@contextmanager
def serving(root, folder, config=DIGITS, **options):
    """A client of the application."""
    from starlette.testclient import TestClient

    from iconformer_mm.serving.app import Service, create_app

    options = dict(device='cpu', rescan_s=0.02, batch_wait_ms=1, **options)
    service = Service(Settings(str(root / config), str(folder), **options))
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        client.service = service
        yield client


def ask(client, name, image, **query):
    return client.post(f'/v1/predict/{name}', content=png(image), headers={'Content-Type': 'image/png'}, params=query)


def wait_for(condition):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError('it did not happen within 10 s')


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Adapter files on the digits' base: two of ten classes, and one of three."""
    folder = tmp_path_factory.mktemp('adapters')
    trained(ROOT, DIGITS, folder / 'ten.safetensors', classes=[f'digit {i}' for i in range(10)], task='digits')
    trained(ROOT, DIGITS, folder / 'other.safetensors', seed=5)
    trained(ROOT, DIGITS, folder / 'three.safetensors', seed=1, num_classes=3, classes=['x', 'y', 'z'])
    return folder


@pytest.fixture(scope='module')
def client(files):
    with serving(ROOT, files, max_body_mb=0.2) as client:
        yield client


@pytest.fixture(scope='module')
def expected(files):
    """The scores of the inferencer, for an adapter and an image."""
    from iconformer_mm.engine import load_config

    three = load_config(str(ROOT / DIGITS))
    three.model.head.num_classes = 3
    specs = {name: files / f'{name}.safetensors' for name in ('ten', 'other')}
    specs['three'] = dict(file=files / 'three.safetensors', config=three)
    inferencer = AdapterInferencer(ROOT / DIGITS, specs, device='cpu')
    return lambda name, image: inferencer([image], adapter=name)[0].pred_score


def scores(answer):
    """Scores in the order of the classes."""
    return torch.tensor([each['score'] for each in sorted(answer['labels'], key=lambda each: each['label'])])


def test_each_adapter_answers_as_its_file_says(client, expected):
    for name in ('ten', 'three', 'other', 'ten'):
        answer = ask(client, name, picture(), top_k=10).json()
        torch.testing.assert_close(scores(answer), expected(name, picture()))
        assert (answer['task'], answer['width'], answer['height']) == ('classification', 48, 40)
    assert [each['name'] for each in ask(client, 'three', picture()).json()['labels'] if each['label'] == 2] == ['z']
    assert len(ask(client, 'ten', picture(), top_k=3).json()['labels']) == 3


def test_json_and_formats(client, expected):
    """The same answer for bytes and base64; each format as OpenCV reads it from a file."""
    image = picture(3)
    body = dict(image=base64.b64encode(png(image)).decode(), options=dict(top_k=10, picture=True))
    answer = client.post('/v1/predict/ten', json=body).json()
    drawing = answer.pop('picture')
    assert answer == ask(client, 'ten', image, top_k=10).json()
    assert Image.open(io.BytesIO(base64.b64decode(drawing))).size[0] > 0
    for suffix in ('.jpg', '.webp', '.bmp'):
        data = cv2.imencode(suffix, image)[1]
        answer = client.post(
            '/v1/predict/ten',
            content=data.tobytes(),
            headers={'Content-Type': 'application/octet-stream'},
            params=dict(top_k=10),
        ).json()
        torch.testing.assert_close(scores(answer), expected('ten', cv2.imdecode(data, cv2.IMREAD_COLOR)))


def test_requests_at_the_same_time_share_batches(files, root, expected):
    """Different adapters and images in one batch; each gets its own answer."""
    from concurrent.futures import ThreadPoolExecutor

    cases = [(('ten', 'three', 'other')[index % 3], picture(index)) for index in range(24)]
    with serving(root, files, max_batch=8) as client:
        client.service.batcher._wait_s = 0.05
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda case: ask(client, *case, top_k=10).json(), cases))
        metrics = client.get('/metrics').text
    for answer, case in zip(answers, cases):
        torch.testing.assert_close(scores(answer), expected(*case))
    assert float(re.search(r'^iconformer_batch_size_sum (\S+)', metrics, re.MULTILINE)[1]) == 24
    assert float(re.search(r'^iconformer_batch_size_count (\S+)', metrics, re.MULTILINE)[1]) < 24
    assert 'iconformer_requests_total{adapter="three",code="ok"} 8.0' in metrics


@pytest.mark.parametrize('task', SCENES)
def test_dense_tasks(task, root, tmp_path):
    from pycocotools import mask as coco

    trained(root, SCENES[task], tmp_path / 'a.safetensors')
    image = picture(1, (96, 128))
    (truth,) = AdapterInferencer(root / SCENES[task], tmp_path / 'a.safetensors', device='cpu')([image])
    with serving(root, tmp_path, SCENES[task]) as client:
        answer = ask(client, 'a', image, score=0, picture=True).json()
        assert base64.b64decode(answer['picture'])[1:4] == b'PNG'
        bare = ask(client, 'a', image, score=0, maps=False).json()
    assert 'picture' not in bare and 'map' not in bare
    if task == 'instance':
        found = truth.pred_instances
        assert len(answer['instances']) == len(found) > 0
        for instance, label, score, box, mask in zip(
            answer['instances'], found.labels, found.scores, found.bboxes, found.masks
        ):
            assert instance['label'] == label and instance['score'] == pytest.approx(score.item(), abs=1e-5)
            torch.testing.assert_close(torch.tensor(instance['box']), box, atol=1e-3, rtol=0)
            assert np.array_equal(coco.decode(instance['mask']), np.asarray(mask).astype(np.uint8))
        assert not any('mask' in instance for instance in bare['instances'])
        return
    read = cv2.imdecode(np.frombuffer(base64.b64decode(answer['map']['png']), np.uint8), cv2.IMREAD_UNCHANGED)
    if task == 'semantic':
        assert np.array_equal(read, truth.pred_sem_seg.data[0].numpy())
        assert sum(answer['area'].values()) == pytest.approx(1)
    else:
        depth = truth.pred_depth_map.data.squeeze().numpy()
        step = answer['map']['metres_per_step']
        np.testing.assert_allclose(read * step, depth.clip(0), atol=step)


def test_the_folder_is_followed(files, root, tmp_path, expected):
    """Files are added, replaced and removed while their server runs."""
    shutil.copy(files / 'ten.safetensors', tmp_path / 'a.safetensors')
    with serving(root, tmp_path) as client:

        def names():
            return [each['name'] for each in client.get('/v1/adapters').json()['adapters']]

        first = ask(client, 'a', picture(), top_k=10).json()
        assert names() == ['a']
        shutil.copy(files / 'three.safetensors', tmp_path / 'new')
        os.replace(tmp_path / 'new', tmp_path / 'b.safetensors')
        wait_for(lambda: names() == ['a', 'b'])
        torch.testing.assert_close(scores(ask(client, 'b', picture()).json()), expected('three', picture()))
        shutil.copy(files / 'other.safetensors', tmp_path / 'new')
        os.replace(tmp_path / 'new', tmp_path / 'a.safetensors')
        wait_for(lambda: ask(client, 'a', picture()).json()['version'] != first['version'])
        torch.testing.assert_close(scores(ask(client, 'a', picture(), top_k=10).json()), expected('other', picture()))
        (tmp_path / 'b.safetensors').unlink()
        wait_for(lambda: ask(client, 'b', picture()).status_code == 404)
        assert names() == ['a']
        ask(client, 'a', picture())
        assert client.service.model.loaded == ['a']


def test_least_used_adapters_leave_memory(files, root, expected):
    with serving(root, files, max_adapters=2) as client:
        for name in ('ten', 'three', 'other', 'three', 'ten'):
            torch.testing.assert_close(scores(ask(client, name, picture(), top_k=10).json()), expected(name, picture()))
            assert len(client.service.model.loaded) <= 2
        assert client.service.model.loaded == ['three', 'ten']
        assert client.service.model.num_loads == 4
        listed = {each['name']: each['loaded'] for each in client.get('/v1/adapters').json()['adapters']}
        assert listed == dict(ten=True, three=True, other=False)


def test_files_that_do_not_fit_are_refused_and_the_others_served(files, root, tmp_path):
    shutil.copy(files / 'ten.safetensors', tmp_path / 'good.safetensors')
    (tmp_path / 'cut.safetensors').write_bytes((files / 'ten.safetensors').read_bytes()[:-100])
    (tmp_path / 'outside.safetensors').symlink_to(files / 'ten.safetensors')
    shutil.copy(files / 'ten.safetensors', tmp_path / 'odd name.safetensors')
    (tmp_path / 'folder.safetensors').mkdir()
    trained(root, SCENES['semantic'], tmp_path / 'foreign.safetensors')
    from iconformer_mm.checkpoint import read_adapter, write_adapter

    content, tensors = read_adapter(files / 'ten.safetensors')
    inside = {name: value for name, value in tensors.items() if name.startswith('backbone.')}
    write_adapter(tmp_path / 'headless.safetensors', content, inside)
    write_adapter(tmp_path / 'short.safetensors', content, dict(list(tensors.items())[1:]))
    with serving(root, tmp_path) as client:
        # The last two show when they are loaded.
        for name in ('headless', 'short'):
            assert ask(client, name, picture()).status_code == 409
        refused = {each['name']: each['refused'] for each in client.get('/v1/adapters').json()['adapters']}
        assert refused.pop('good') is None
        for name, reason in dict(
            cut='not a valid safetensors file',
            outside='link that leads out',
            foreign='trained on another base',
            headless='no neck or head',
            short='1 tensors? (are|is) missing|should be',
            **{'odd name': 'its name must be letters'},
        ).items():
            assert re.search(reason, refused.pop(name)), name
            error = ask(client, name, picture()).json()['error']
            assert error['code'] == 'adapter_refused' and str(tmp_path) not in error['message']
        assert refused == {}
        assert ask(client, 'good', picture()).status_code == 200
        # What is mended is served.
        shutil.copy(files / 'ten.safetensors', tmp_path / 'new')
        os.replace(tmp_path / 'new', tmp_path / 'cut.safetensors')
        wait_for(lambda: ask(client, 'cut', picture()).status_code == 200)


def bomb(width, height):
    """A small PNG that says it unfolds to this size."""

    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b'\0' * 1000)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', rows) + chunk(b'IEND', b'')


GOOD = png(picture())
HOSTILE = [
    (b'', 'image/png', 400, 'bad_image'),
    (b'no image', 'image/png', 400, 'bad_image'),
    (GOOD[:-40], 'image/png', 400, 'bad_image'),
    (GOOD[:60], 'image/png', 400, 'bad_image'),
    (cv2.imencode('.jpg', picture())[1].tobytes()[:-30], 'image/jpeg', 400, 'bad_image'),
    (b'GIF89a' + GOOD, 'image/gif', 400, 'bad_image'),
    (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'image/svg+xml', 400, 'bad_image'),
    (bomb(30_000, 30_000), 'image/png', 413, 'image_too_large'),
    (bomb(2**31 - 1, 2**31 - 1), 'image/png', 413, 'image_too_large'),
    (bomb(0, 0), 'image/png', 400, 'bad_image'),
    (b'x' * 200_001, 'image/png', 413, 'body_too_large'),
    (GOOD, 'text/plain', 415, 'unsupported_type'),
    (GOOD, 'multipart/form-data; boundary=x', 415, 'unsupported_type'),
    (b'{', 'application/json', 400, 'bad_json'),
    (b'\xff\xfe', 'application/json', 400, 'bad_json'),
    (b'[' * 100_000, 'application/json', 400, 'bad_json'),
    (b'[]', 'application/json', 422, 'bad_options'),
    (b'{"image": 7}', 'application/json', 422, 'bad_options'),
    (b'{"image": "///", "options": {}}', 'application/json', 400, 'bad_base64'),
    (b'{"image": "AAAA", "path": "/etc/passwd"}', 'application/json', 422, 'bad_options'),
    (b'{"image": "AAAA", "options": {"score": NaN}}', 'application/json', 422, 'bad_options'),
    (b'{"image": "AAAA", "options": {"score": 2}}', 'application/json', 422, 'bad_options'),
    (b'{"image": "AAAA", "options": {"top_k": 1e400}}', 'application/json', 422, 'bad_options'),
    (b'{"image": "AAAA", "options": {"sorce": 0.5}}', 'application/json', 422, 'bad_options'),
]


@pytest.mark.parametrize(('body', 'kind', 'status', 'code'), HOSTILE)
def test_hostile_bodies(body, kind, status, code, client):
    response = client.post('/v1/predict/ten', content=body, headers={'Content-Type': kind})
    assert (response.status_code, response.json()['error']['code']) == (status, code)
    assert response.json()['error']['message']


@pytest.mark.parametrize(
    'name',
    [
        '..',
        '../ten',
        '%2e%2e%2ften',
        '..%2F..%2Fetc%2Fpasswd',
        'ten.safetensors',
        '%00',
        'ten%00',
        'TEN',
        ' ',
        'a' * 3000,
    ],
)
def test_names_never_leave_the_folder(name, client):
    response = client.post(f'/v1/predict/{name}', content=GOOD, headers={'Content-Type': 'image/png'})
    assert response.status_code == 404 and response.json()['error']['code'] in ('unknown_adapter', 'not_found')


def test_other_mistakes(client):
    response = ask(client, 'tem', picture())
    assert response.json()['error']['message'] == "there is no adapter 'tem' (did you mean 'ten'?)"
    assert client.get('/v1/predict/ten').json()['error']['code'] == 'method_not_allowed'
    assert client.get('/nothing').json()['error']['code'] == 'not_found'
    response = ask(client, 'ten', picture(), score='high')
    assert response.json()['error'] == dict(
        code='bad_options',
        message='score: Input should be a valid number, unable to parse string as a number',
    )
    # Nothing hostile has harmed it.
    assert ask(client, 'ten', picture()).status_code == 200


def test_a_body_without_a_declared_length(client):

    def chunks():
        for _ in range(30):
            yield b'x' * 10_000

    response = client.post('/v1/predict/ten', content=chunks(), headers={'Content-Type': 'image/png'})
    assert (response.status_code, response.json()['error']['code']) == (413, 'body_too_large')


def test_an_image_that_the_model_cannot_take_harms_no_other(root, files, expected, monkeypatch):
    """In one batch with others, which are answered."""
    from iconformer_mm.serving.model import Job, ServedModel

    model = ServedModel(Settings(str(root / DIGITS), str(files), device='cpu'))
    model.folder.scan()
    jobs = [Job('ten', model.prepare(picture(seed))) for seed in range(3)]
    forward = model._inferencer.forward

    def refuse_second(batch):
        if any(torch.equal(image, jobs[1].batch['inputs'][0]) for image in batch['inputs']):
            raise RuntimeError('output size is\ntoo small')
        return forward(batch)

    monkeypatch.setattr(model._inferencer, 'forward', refuse_second)
    first, second, third = model.predict([*jobs])
    torch.testing.assert_close(first.sample.pred_score, expected('ten', picture(0)))
    torch.testing.assert_close(third.sample.pred_score, expected('ten', picture(2)))
    assert second.code == 'image_not_taken' and 'RuntimeError: output size is too small' in str(second)


def test_methods_of_any_kind_in_one_batch(root, tmp_path, monkeypatch):
    """Those that can share a batch do, and the others have batches of their own."""
    from families import stir
    from mmengine.registry import MODELS

    from iconformer_mm import inject, save_adapter
    from iconformer_mm.engine import load_config
    from iconformer_mm.serving.model import Job, ServedModel

    names = ['icon', 'lora', 'vpt', 'ssf', 'convpass', 'frozen']
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        model = MODELS.build(load_config(str(root / DIGITS)).model)
        model.init_weights()
        inject(model, name)
        save_adapter(stir(model, seed), tmp_path / f'{name}.safetensors')
    files = {name: tmp_path / f'{name}.safetensors' for name in names}
    truth = AdapterInferencer(root / DIGITS, files, device='cpu')
    model = ServedModel(Settings(str(root / DIGITS), str(tmp_path), device='cpu'))
    model.folder.scan()
    cases = [(names[index % len(names)], picture(index)) for index in range(2 * len(names))]
    forward, sizes = model._inferencer.forward, []

    def count(batch):
        sizes.append(len(batch['data_samples']))
        return forward(batch)

    monkeypatch.setattr(model._inferencer, 'forward', count)
    predictions = model.predict([Job(name, model.prepare(image)) for name, image in cases])
    assert sorted(sizes) == [2, 2, 8]  # vpt, ssf, and the four others
    for (name, image), prediction in zip(cases, predictions):
        (expected,) = truth([image], adapter=name)
        torch.testing.assert_close(prediction.sample.pred_score, expected.pred_score, msg=name)


def test_token(root, files, tmp_path):
    (tmp_path / 'token').write_text('secret\n')
    with serving(root, files, token_file=str(tmp_path / 'token')) as client:
        for headers in ({}, {'Authorization': 'Bearer wrong'}, {'Authorization': 'Basic secret'}):
            for path in ('/v1/adapters', '/metrics'):
                response = client.get(path, headers=headers)
                assert response.status_code == 401 and response.headers['WWW-Authenticate'] == 'Bearer'
                assert response.json()['error']['code'] == 'unauthorized'
            response = client.post('/v1/predict/none', content=b'', headers=headers)
            assert response.status_code == 401  # and nothing is said about names
        assert client.get('/v1/adapters', headers={'Authorization': 'Bearer secret'}).status_code == 200
        for path in ('/healthz', '/', '/docs', '/openapi.json'):
            assert client.get(path).status_code == 200


def test_pages(client):
    for path in ('/', '/docs'):
        response = client.get(path)
        assert response.headers['content-type'].startswith('text/html')
        assert "default-src 'none'" in response.headers['content-security-policy']
        assert 'http://' not in response.text and 'https://' not in response.text
    described = client.get('/openapi.json').json()
    assert set(described['paths']) == {'/v1/predict/{adapter}', '/v1/adapters', '/healthz', '/metrics'}
    operation = described['paths']['/v1/predict/{adapter}']['post']
    assert set(operation['requestBody']['content']) == {'application/json', 'image/*', 'application/octet-stream'}
    assert {each['name'] for each in operation['parameters']} == {'adapter', 'score', 'top_k', 'maps', 'picture'}
    assert client.get('/healthz').json() == dict(status='ok', adapters=3)


def test_too_many_and_too_slow(root, files):
    """Requests beyond the limits are refused; those that wait when the server ends are answered."""
    from concurrent.futures import ThreadPoolExecutor
    from threading import Event

    release = Event()
    with serving(root, files, max_waiting=2, max_batch=1, timeout_s=0.4) as client:
        predict = client.service.model.predict

        def slow(jobs):
            release.wait(10)
            return predict(jobs)

        client.service.model.predict = slow
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda _: ask(client, 'ten', picture()).json()['error']['code'], range(6)))
        assert set(answers) == {'timeout', 'overloaded'}
        release.set()
        wait_for(lambda: ask(client, 'ten', picture()).status_code == 200)


def test_drain(root, files):
    import asyncio

    from iconformer_mm.serving.batching import Batcher
    from iconformer_mm.serving.errors import RequestError

    async def run():
        batcher = Batcher(lambda items: [item + 1 for item in items], 2, 0.01, 100)
        batcher.start()
        waiting = [asyncio.create_task(batcher.submit(index)) for index in range(7)]
        await asyncio.sleep(0)
        await batcher.close()
        assert await asyncio.gather(*waiting) == [1, 2, 3, 4, 5, 6, 7]
        with pytest.raises(RequestError, match='shutting down'):
            await batcher.submit(1)

    asyncio.run(run())


def test_what_cannot_be_served_is_said_at_the_start(root, files, tmp_path):
    from iconformer_mm.serving.app import Service

    def refused(folder, message, **options):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            Service(Settings(str(root / DIGITS), str(folder), device='cpu', **options))

    refused(tmp_path / 'none', 'the folder of adapters .*none does not exist')
    (tmp_path / 'empty').mkdir()
    refused(tmp_path / 'empty', r'holds no adapter file \(\*.safetensors\)')
    refused(files, 'the base none.pth does not exist', base='none.pth')
    refused(files, 'the token file .* cannot be read', token_file=str(tmp_path / 'none'))
    (tmp_path / 'empty' / 'a.safetensors').write_bytes(b'nothing')
    refused(tmp_path / 'empty', 'none of the adapter files in .* can be served: a: .* is not a valid safetensors file')
    with pytest.raises(ValueError, match="unknown option 'adapter' of a server .did you mean 'adapters'"):
        Settings.from_options(dict(config='c', adapter='d'))
    with pytest.raises(ValueError, match="option 'max_batch' must be a whole number, got 'many'"):
        Settings.from_options(dict(config='c', adapters='d', max_batch='many'))
    with pytest.raises(ValueError, match='max_batch must be above 0, got 0'):
        Settings('c', 'd', max_batch=0)
    made = Settings.from_options(dict(config='c', adapters='d', max_batch='4', trust='true', timeout_s='1'))
    assert made == Settings('c', 'd', max_batch=4, trust=True, timeout_s=1.0)


def test_an_empty_folder_may_be_allowed(root, files, tmp_path):
    with serving(root, tmp_path, allow_empty=True) as client:
        assert ask(client, 'a', picture()).status_code == 404
        shutil.copy(files / 'ten.safetensors', tmp_path / 'new')
        os.replace(tmp_path / 'new', tmp_path / 'a.safetensors')
        wait_for(lambda: ask(client, 'a', picture()).status_code == 200)
