"""Prediction over the libraries' inferencers, against the models called directly."""

import cv2
import numpy as np
import pytest
import torch
from families import stir
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from trained_adapters import DIGITS, SCENES, digit, trained

from iconformer_mm import inject, save_adapter
from iconformer_mm.checkpoint import read_adapter, write_adapter
from iconformer_mm.engine import load_config
from iconformer_mm.inference import AdapterInferencer
from iconformer_mm.tuning import get_injection
from iconformer_mm.tuning.accounting import WeightsError


def scores(model, image):
    with torch.no_grad():
        data = dict(inputs=[torch.from_numpy(image)[None]])
        return model(**model.data_preprocessor(data), mode='predict')[0].pred_score


@pytest.fixture
def photo():
    return np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)


def test_classification(root, tmp_path):
    model = trained(root, DIGITS, tmp_path / 'a.safetensors')
    inferencer = AdapterInferencer(root / DIGITS, tmp_path / 'a.safetensors', device='cpu')
    predictions = inferencer([digit(0), digit(1), digit(2)], batch_size=2)
    for seed, prediction in enumerate(predictions):
        torch.testing.assert_close(prediction.pred_score, scores(model, digit(seed)))
    assert inferencer.classes == tuple('0123456789')
    cv2.imwrite(str(tmp_path / 'digit.png'), digit(1))
    (from_file,) = inferencer(tmp_path / 'digit.png')
    torch.testing.assert_close(from_file.pred_score, predictions[1].pred_score)


def test_several_adapters_with_heads_of_their_own(root, tmp_path):
    first = trained(root, DIGITS, tmp_path / 'a.safetensors', classes=[f'digit {i}' for i in range(10)])
    second = trained(root, DIGITS, tmp_path / 'b.safetensors', seed=1, num_classes=3, classes=['x', 'y', 'z'])
    other = load_config(str(root / DIGITS))
    other.model.head.num_classes = 3
    inferencer = AdapterInferencer(
        root / DIGITS,
        dict(a=tmp_path / 'a.safetensors', b=dict(file=tmp_path / 'b.safetensors', config=other)),
        device='cpu',
    )
    assert inferencer.adapters == ['a', 'b'] and inferencer.classes[3] == 'digit 3'
    for _ in range(2):
        torch.testing.assert_close(inferencer(digit(), adapter='a')[0].pred_score, scores(first, digit()))
        torch.testing.assert_close(inferencer(digit(), adapter='b')[0].pred_score, scores(second, digit()))
    assert inferencer.classes == ('x', 'y', 'z')
    with pytest.raises(ValueError, match="no adapter 'c'; there are: a, b"):
        inferencer(digit(), adapter='c')


@pytest.mark.parametrize('names', [('a', 'default'), ('default', 'a')])
def test_an_adapter_named_default_beside_others(names, root, tmp_path):
    models = {name: trained(root, DIGITS, tmp_path / f'{name}.safetensors') for name in names}
    for name, model in models.items():
        stir(model, seed=len(name))
        save_adapter(model, tmp_path / f'{name}.safetensors')
    files = {name: tmp_path / f'{name}.safetensors' for name in names}
    inferencer = AdapterInferencer(root / DIGITS, files, device='cpu')
    assert inferencer.adapters == list(names)
    for name in (*names, *names):
        torch.testing.assert_close(inferencer(digit(), adapter=name)[0].pred_score, scores(models[name], digit()))
    assert not torch.equal(*(scores(model, digit()) for model in models.values()))


def test_an_adapter_named_default_with_a_head_of_its_own(root, tmp_path):
    model = trained(root, DIGITS, tmp_path / 'a.safetensors', num_classes=3)
    other = load_config(str(root / DIGITS))
    other.model.head.num_classes = 3
    spec = dict(default=dict(file=tmp_path / 'a.safetensors', config=other))
    inferencer = AdapterInferencer(root / DIGITS, spec, device='cpu')
    torch.testing.assert_close(inferencer(digit())[0].pred_score, scores(model, digit()))


@pytest.mark.parametrize('task', SCENES)
@pytest.mark.filterwarnings('ignore')
def test_dense_tasks(task, root, photo, tmp_path):
    """The same as the model gives without the library's inferencer around it."""
    model = trained(root, SCENES[task], tmp_path / 'a.safetensors')
    inferencer = AdapterInferencer(root / SCENES[task], tmp_path / 'a.safetensors', device='cpu')
    (prediction,) = inferencer(photo)
    sample = prediction.new(metainfo=dict(prediction.metainfo))
    data = model.data_preprocessor(dict(inputs=[torch.from_numpy(photo).permute(2, 0, 1)], data_samples=[sample]))
    with torch.no_grad():
        (expected,) = model(**data, mode='predict')
    key = dict(instance='pred_instances', semantic='pred_sem_seg', depth='pred_depth_map')[task]
    actual, expected = prediction.get(key), expected.get(key)
    if task == 'instance':
        torch.testing.assert_close(actual.bboxes, expected.bboxes)
        assert len(inferencer.classes) == 5
    else:
        torch.testing.assert_close(actual.data, expected.data)
        assert actual.data.shape[-2:] == photo.shape[:2]


def test_an_adapter_for_each_image(root, tmp_path):
    """Classifiers of other classes in one batch, each image as by its own model."""
    first = trained(root, DIGITS, tmp_path / 'a.safetensors')
    second = trained(root, DIGITS, tmp_path / 'b.safetensors', num_classes=3, classes=['x', 'y', 'z'], stirred=2)
    other = load_config(str(root / DIGITS))
    other.model.head.num_classes = 3
    inferencer = AdapterInferencer(
        root / DIGITS,
        dict(a=tmp_path / 'a.safetensors', b=dict(file=tmp_path / 'b.safetensors', config=other)),
        device='cpu',
    )
    names = ['b', 'a', 'a', None, 'b']
    images = [digit(seed) for seed in range(5)]
    for batch_size in (1, 2, 5):
        predictions = inferencer(images, adapter=names, batch_size=batch_size)
        for image, name, prediction in zip(images, names, predictions, strict=True):
            if name is not None:
                model = dict(a=first, b=second)[name]
                torch.testing.assert_close(prediction.pred_score, scores(model, image), rtol=0, atol=1e-6)
    assert len(predictions[3].pred_score) == 10 and not torch.equal(predictions[3].pred_score, scores(first, images[3]))
    assert inferencer.classes == tuple('0123456789') and inferencer.meta_of('b')['classes'] == ('x', 'y', 'z')
    assert inferencer.meta_of(None) == inferencer.meta == inferencer.meta_of('a')
    with pytest.raises(ValueError, match='2 adapters were given for 3 images: give one for each image'):
        inferencer(images[:3], adapter=['a', 'b'])
    with pytest.raises(ValueError, match="no adapter 'c'; there are: a, b"):
        inferencer(images[:2], adapter=['a', 'c'])


@pytest.mark.parametrize('task', SCENES)
@pytest.mark.filterwarnings('ignore')
def test_dense_tasks_with_an_adapter_for_each_image(task, root, photo, tmp_path):
    """As with one adapter at a time."""
    for name, seed in (('a', 1), ('b', 2)):
        trained(root, SCENES[task], tmp_path / f'{name}.safetensors', stirred=seed)
    inferencer = AdapterInferencer(
        root / SCENES[task], {name: tmp_path / f'{name}.safetensors' for name in 'ab'}, device='cpu'
    )
    for adapter in get_injection(inferencer.model).adapters.values():
        for part in adapter.parts.values():  # heads that differ, and answer more than a constant
            for parameter in part.parameters():
                parameter.data.add_(0.01 * torch.randn_like(parameter))
    photos = [photo, photo[:, ::-1].copy(), photo[::-1].copy()]
    names = ['b', 'a', 'b']
    found = inferencer(photos, adapter=names, batch_size=3)
    differs = False
    for image, name, prediction in zip(photos, names, found, strict=True):
        (expected,) = inferencer(image, adapter=name)
        (other,) = inferencer(image, adapter='a' if name == 'b' else 'b')
        assert_same_prediction(prediction, expected)
        differs |= not same_tensors(expected, other)
    assert differs
    with pytest.raises(ValueError, match='images 0 and 1 have different sizes after the test pipeline.*batch_size=1'):
        inferencer([photo, photo[:48]], adapter=['a', 'b'], batch_size=2)
    assert len(inferencer([photo, photo[:48]], adapter=['a', 'b'])) == 2


def tensors_of(prediction):
    """The predicted maps, or boxes, scores, labels and masks."""
    if 'pred_instances' in prediction:
        instances = prediction.pred_instances
        return [instances.bboxes, instances.scores, instances.labels, instances.masks]
    maps = [prediction.get(key) for key in ('seg_logits', 'pred_depth_map') if key in prediction]
    return [each.data for each in maps]


def same_tensors(first, second):
    pairs = list(zip(tensors_of(first), tensors_of(second), strict=True))
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def assert_same_prediction(first, second):
    assert tensors_of(first)
    for a, b in zip(tensors_of(first), tensors_of(second), strict=True):
        if a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * max(1, b.abs().max().item() if len(b) else 1))
        else:
            assert torch.equal(a, b)


def test_without_a_file_the_checkpoint_is_taken_as_it_is(root, tmp_path):
    """A checkpoint of an adapted model, adapted by the hook of its config."""
    model = trained(root, DIGITS, tmp_path / 'a.safetensors')
    torch.save(dict(state_dict=model.state_dict(), meta={}), tmp_path / 'whole.pth')
    inferencer = AdapterInferencer(root / DIGITS, base=tmp_path / 'whole.pth', device='cpu')
    torch.testing.assert_close(inferencer(digit())[0].pred_score, scores(model, digit()))


def test_mistakes(root, tmp_path):
    trained(root, DIGITS, tmp_path / 'a.safetensors')
    with pytest.raises(FileNotFoundError, match='none.safetensors does not exist'):
        AdapterInferencer(root / DIGITS, tmp_path / 'none.safetensors', device='cpu')
    with pytest.raises(FileNotFoundError, match='the base .*none.pth does not exist'):
        AdapterInferencer(root / DIGITS, tmp_path / 'a.safetensors', base=tmp_path / 'none.pth', device='cpu')
    with pytest.raises(ValueError, match="default_scope is 'mmpose'; prediction supports mmpretrain, mmdet"):
        AdapterInferencer(Config(dict(default_scope='mmpose', model=dict())), device='cpu')
    bare = load_config(str(root / DIGITS))
    bare.model.backbone.pop('init_cfg')
    with pytest.raises(ValueError, match='there are no base weights'):
        AdapterInferencer(bare, tmp_path / 'a.safetensors', device='cpu')
    with pytest.raises(ValueError, match="adapter 'a' must be a file or dict"):
        AdapterInferencer(root / DIGITS, dict(a=dict(path='a.safetensors')), device='cpu')


def test_a_head_that_is_in_no_file_is_not_predicted_with(root, tmp_path):
    trained(root, DIGITS, tmp_path / 'a.safetensors')
    with pytest.raises(WeightsError, match='the weights that the config names lacks 2 of .* such as head.fc.weight'):
        AdapterInferencer(load_config(str(root / DIGITS), 'frozen'), device='cpu')
    save_adapter_of_backbone(tmp_path / 'a.safetensors', tmp_path / 'b.safetensors')
    with pytest.raises(WeightsError, match='names and .*b.safetensors lacks 2 of .* such as head.fc.weight'):
        AdapterInferencer(root / DIGITS, tmp_path / 'b.safetensors', device='cpu')
    with pytest.raises(ValueError, match='a.safetensors is an adapter file, not a base: give it as `adapter`'):
        AdapterInferencer(root / DIGITS, base=tmp_path / 'a.safetensors', device='cpu')


def save_adapter_of_backbone(path, out):
    content, tensors = read_adapter(path)
    write_adapter(out, content, {n: v for n, v in tensors.items() if n.startswith('backbone.')})


def test_another_method_than_that_of_the_checkpoint(root, tmp_path):
    model = trained(root, DIGITS, tmp_path / 'a.safetensors')
    torch.save(dict(state_dict=model.state_dict(), meta={}), tmp_path / 'whole.pth')
    with pytest.raises(WeightsError, match='whole.pth was trained with another PEFT method, or with other options'):
        AdapterInferencer(load_config(str(root / DIGITS), 'lora'), base=tmp_path / 'whole.pth', device='cpu')


def test_weights_that_timm_loads_itself_are_a_base(tmp_path):
    import timm

    options = dict(img_size=32, embed_dim=32, depth=2, num_heads=2, in_chans=1)
    torch.manual_seed(0)
    torch.save(timm.create_model('vit_tiny_patch16_224', num_classes=1000, **options).state_dict(), tmp_path / 'w.pth')
    pipeline = [dict(type='PackInputs')]
    backbone = dict(type='TIMMBackbone', model_name='vit_tiny_patch16_224', checkpoint_path=str(tmp_path / 'w.pth'))
    backbone.update(img_size=32, embed_dim=32, depth=2, num_heads=2, in_channels=1, num_classes=1000)
    cfg = Config(
        dict(
            default_scope='mmpretrain',
            model=dict(
                type='ImageClassifier',
                data_preprocessor=dict(mean=[0.0], std=[255.0]),
                backbone=backbone,
                neck=dict(type='TokenMean'),
                head=dict(type='LinearClsHead', num_classes=4, in_channels=32),
            ),
            test_dataloader=dict(dataset=dict(type='Strokes', pipeline=pipeline)),
        )
    )
    init_default_scope('mmpretrain')
    model = MODELS.build(cfg.model)
    inject(model, 'icon', bottleneck=8)
    stir(model).eval()
    save_adapter(model, tmp_path / 'a.safetensors')
    image = np.random.default_rng(0).integers(0, 255, (32, 32), dtype=np.uint8)
    (prediction,) = AdapterInferencer(cfg, tmp_path / 'a.safetensors', device='cpu')(image)
    torch.testing.assert_close(prediction.pred_score, scores(model, image))


@MODELS.register_module()
class TokenMean(torch.nn.Module):
    """Makes one vector of timm's tokens."""

    def forward(self, features):
        return (features[-1].mean(1),)
