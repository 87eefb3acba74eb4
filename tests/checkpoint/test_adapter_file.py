import copy
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from families import FAMILIES, flatten, image, stir
from safetensors.numpy import load_file
from safetensors.torch import save_file
from small_classifiers import classifier, logits, trained

from iconformer_mm import (
    active_adapter,
    add_adapter,
    delete_adapter,
    inject,
    list_adapters,
    load_adapter,
    save_adapter,
    summarize,
)
from iconformer_mm.checkpoint import (
    AdapterFileError,
    base_parameters,
    fingerprint,
    hash_parameters,
    load_safetensors,
    read_adapter,
    same_base,
    save_safetensors,
    write_adapter,
)


def test_round_trip(tmp_path):
    source = trained(bottleneck=8, kernel_size=5)
    save_adapter(source, tmp_path / 'a.safetensors', metadata=dict(task='digits'))
    target = classifier()  # the same base, freshly made
    content = load_adapter(target, tmp_path / 'a.safetensors')
    assert torch.equal(logits(target), logits(source))
    assert content['method']['bottleneck'] == 8 and content['notes'] == dict(task='digits')
    assert summarize(target) == summarize(source)
    assert os.listdir(tmp_path) == ['a.safetensors']


def test_round_trip_in_another_process(tmp_path):
    source = trained()
    save_adapter(source, tmp_path / 'a.safetensors')
    code = (
        f'import sys, torch; sys.path.insert(0, {os.path.dirname(os.path.dirname(__file__))!r}); '
        'from iconformer_mm import load_adapter; from small_classifiers import classifier, logits; '
        f'm = classifier(); load_adapter(m, {str(tmp_path / "a.safetensors")!r}); '
        f'torch.save(logits(m), {str(tmp_path / "logits.pt")!r})'
    )
    subprocess.run([sys.executable, '-c', code], check=True, capture_output=True)
    torch.testing.assert_close(torch.load(tmp_path / 'logits.pt'), logits(source))


@pytest.mark.parametrize('family', [f for f in FAMILIES if 'SwinV2' not in f.name], ids=str)
def test_backbones_alone(family, tmp_path):
    torch.manual_seed(0)
    base = family.build()
    source = copy.deepcopy(base)
    inject(source)
    stir(source).eval()
    save_adapter(source, tmp_path / 'a.safetensors')
    load_adapter(base, tmp_path / 'a.safetensors')
    base.eval()
    for a, b in zip(flatten(base(image(family.sizes[0]))), flatten(source(image(family.sizes[0])))):
        assert torch.equal(a, b)


def test_a_backbone_takes_the_adapters_of_a_whole_model(tmp_path):
    source = trained()
    save_adapter(source, tmp_path / 'a.safetensors')
    backbone = classifier().backbone
    load_adapter(backbone, tmp_path / 'a.safetensors')
    backbone.eval()
    source.eval()
    assert torch.equal(backbone(image((64, 64)))[0], source.backbone(image((64, 64)))[0])


def test_readable_without_us(tmp_path):
    source = trained()
    save_adapter(source, tmp_path / 'a.safetensors')
    tensors = load_file(tmp_path / 'a.safetensors')
    np.testing.assert_array_equal(tensors['head.fc.weight'], source.head.fc.weight.detach().numpy())
    key = 'backbone.layers.1.adapter_attention.up.weight'
    np.testing.assert_array_equal(tensors[key], source.backbone.layers[1].adapter_attention.up.weight.detach().numpy())
    assert all('adapter' in name for name in tensors if name.startswith('backbone.'))
    with open(tmp_path / 'a.safetensors', 'rb') as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), 'little')))
    content = json.loads(header['__metadata__']['iconformer_mm'])
    assert content['sites'] == ['layers.0', 'layers.1'] and content['method']['type'] == 'icon'


def test_linear_probing_keeps_the_head(tmp_path):
    source = trained(method='frozen')
    save_adapter(source, tmp_path / 'a.safetensors')
    target = classifier(seed=0)
    load_adapter(target, tmp_path / 'a.safetensors')
    assert torch.equal(logits(target), logits(source))


def test_fingerprint():
    model = classifier()
    reference = fingerprint(model)
    assert fingerprint(model.backbone) == reference
    for dtype in (torch.bfloat16, torch.float16):
        assert same_base(fingerprint(copy.deepcopy(model).to(dtype)), reference)
    inject(model)
    stir(model)
    assert fingerprint(model) == reference
    shuffled = copy.deepcopy(model)
    for module in shuffled.modules():
        module._parameters = dict(reversed(module._parameters.items()))
    assert fingerprint(shuffled) == reference
    with torch.no_grad():
        model.backbone.layers[1].ffn.layers[1].bias[0] += 0.1
    assert fingerprint(model) != reference


def adapted_resnet(path=None, **changed):
    """A ResNet with running statistics; adapted if its adapter is to be written."""
    from mmpretrain.models.backbones import ResNet

    torch.manual_seed(0)
    backbone = ResNet(18)
    with torch.no_grad():
        for name, buffer in backbone.named_buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.rand(buffer.shape, generator=torch.Generator().manual_seed(1)))
            if name in changed.get('shifted', ()):
                buffer.add_(1)
    if path is not None:
        inject(backbone, 'bitfit')
        save_adapter(stir(backbone), path)
    backbone.eval()
    return backbone


def test_other_running_statistics_are_another_base(tmp_path):
    path = tmp_path / 'a.safetensors'
    source = adapted_resnet(path)
    other = adapted_resnet(shifted=['layer1.0.bn1.running_mean'])
    message = r'another base: the base buffers \(running statistics\) have fingerprint .*, the adapter needs'
    assert_refused(other, path, message)
    counted = adapted_resnet(shifted=['bn1.num_batches_tracked'])  # no evaluation reads it
    load_adapter(counted, path)
    x = image((64, 64))
    assert torch.equal(counted(x)[0], source(x)[0])
    for dtype in (torch.bfloat16, torch.float16):
        load_adapter(adapted_resnet().to(dtype), path)


def test_files_without_a_fingerprint_of_buffers_still_load(tmp_path):
    """As earlier releases wrote them."""
    path = tmp_path / 'a.safetensors'
    source = adapted_resnet(path)
    content, tensors = read_adapter(path)
    del content['base_buffers'], content['base_buffers_fingerprint']
    write_adapter(path, content, tensors)
    target = adapted_resnet()
    load_adapter(target, path)
    x = image((64, 64))
    assert torch.equal(target(x)[0], source(x)[0])
    content['base_buffers'] = ['bn1.running_mean']
    write_adapter(path, content, tensors)
    assert_refused(adapted_resnet(), path, 'its metadata has no valid `base_buffers_fingerprint`')


def test_a_base_with_more_than_that_of_the_file_is_another(tmp_path):
    path = tmp_path / 'a.safetensors'
    save_adapter(trained(), path)
    content, tensors = read_adapter(path)
    content['base_parameters'].remove('cls_token')
    own = {n: v for n, v in base_parameters(classifier()).items() if n != 'cls_token'}
    content['base_fingerprint'] = hash_parameters(own)
    write_adapter(path, content, tensors)
    assert_refused(classifier(), path, 'another base: the model has cls_token, which that base lacked')


def assert_refused(model, path, message, **kwargs):
    state = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(AdapterFileError, match=message):
        load_adapter(model, path, **kwargs)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())


def test_another_base_is_refused(tmp_path):
    save_adapter(trained(), tmp_path / 'a.safetensors')
    other = classifier(seed=1)
    assert_refused(other, tmp_path / 'a.safetensors', 'does not fit: it was trained on another base')
    load_adapter(other, tmp_path / 'a.safetensors', strict=False)
    assert summarize(other).method == 'icon'


def test_another_head_is_refused(tmp_path):
    save_adapter(trained(), tmp_path / 'a.safetensors')
    other = classifier(num_classes=5)
    with torch.no_grad():
        for name, value in classifier().backbone.state_dict().items():
            other.backbone.state_dict()[name].copy_(value)
    assert_refused(other, tmp_path / 'a.safetensors', '2 tensors are of another shape or kind, such as head.fc.bias')
    load_adapter(other, tmp_path / 'a.safetensors', strict=False)
    assert other.backbone.layers[0].adapter_attention.up.weight.abs().sum() > 0


def test_another_method_is_refused(tmp_path):
    save_adapter(trained(), tmp_path / 'a.safetensors')
    other = classifier()
    inject(other, 'adaptformer')
    assert_refused(other, tmp_path / 'a.safetensors', "holds .*'icon'.*the model is adapted by .*'adaptformer'")


@pytest.mark.parametrize('damage', ['truncate', 'empty', 'pickle', 'foreign', 'version'])
def test_bad_files_are_refused(damage, tmp_path):
    path = tmp_path / 'a.safetensors'
    save_adapter(trained(), path)
    message = 'not a valid safetensors file'
    if damage == 'truncate':
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == 'empty':
        path.write_bytes(b'')
    elif damage == 'pickle':
        torch.save(dict(state_dict={}), path)
    elif damage == 'foreign':
        save_file({'x': torch.zeros(1)}, path)
        message = 'not an adapter file of iconformer_mm'
    else:
        tensors = {'x': torch.zeros(1)}
        save_safetensors(tensors, path, metadata={'iconformer_mm': json.dumps(dict(format_version=99))})
        message = 'has format version 99'
    assert_refused(classifier(), path, message)


def test_missing_file():
    with pytest.raises(FileNotFoundError, match='adapter file nowhere.safetensors does not exist'):
        load_adapter(classifier(), 'nowhere.safetensors')


def test_models_without_an_adapter_are_refused(tmp_path):
    model = classifier()
    with pytest.raises(ValueError, match='ImageClassifier is not adapted'):
        save_adapter(model, tmp_path / 'a.safetensors')
    inject(model, 'full')
    with pytest.raises(ValueError, match="method 'full' trains the backbone itself"):
        save_adapter(model, tmp_path / 'a.safetensors')
    assert not list(tmp_path.iterdir())


def test_without_an_active_adapter_a_name_is_needed(tmp_path):
    model = trained()
    save_adapter(model, tmp_path / 'a.safetensors')
    add_adapter(model, 'other')
    delete_adapter(model, 'default')
    with pytest.raises(ValueError, match='no adapter is active: set_adapter first, or give a name'):
        load_adapter(model, tmp_path / 'a.safetensors')
    assert list_adapters(model) == ['other'] and active_adapter(model) is None
    load_adapter(model, tmp_path / 'a.safetensors', name='again')
    assert list_adapters(model) == ['other', 'again'] and active_adapter(model) is None


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / 'a.safetensors'
    model = trained()
    save_adapter(model, path)
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError('no space left on device')

    monkeypatch.setattr('iconformer_mm.checkpoint.safetensors_io.save_file', fail)
    with pytest.raises(OSError, match='no space left'):
        save_adapter(model, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ['a.safetensors']


def test_mmengine_reads_safetensors(tmp_path):
    from mmengine.runner import CheckpointLoader

    save_file({'w': torch.ones(2)}, tmp_path / 'w.safetensors')
    assert torch.equal(CheckpointLoader.load_checkpoint(str(tmp_path / 'w.safetensors'))['w'], torch.ones(2))
    (tmp_path / 'bad.safetensors').write_bytes(b'no')
    with pytest.raises(RuntimeError, match='bad.safetensors is not a valid safetensors file'):
        load_safetensors(str(tmp_path / 'bad.safetensors'))
    with pytest.raises(FileNotFoundError):
        load_safetensors(str(tmp_path / 'none.safetensors'))


def rewrite(path, change):
    """Change the tensors of an adapter file."""
    content, tensors = read_adapter(path)
    write_adapter(path, content, change(tensors))


def test_what_fits_of_a_file_goes_into_an_unadapted_model(tmp_path):
    """One adapter tensor missing, one of another shape, one too many: refused, or loaded in part if asked for."""
    model = trained()
    save_adapter(model, tmp_path / 'a.safetensors')

    def change(tensors):
        tensors = dict(tensors)
        tensors.pop('backbone.layers.0.adapter_attention.up.bias')
        tensors['backbone.layers.1.adapter_attention.down.bias'] = torch.zeros(3)
        return {**tensors, 'backbone.layers.1.adapter_attention.unknown': torch.zeros(2)}

    rewrite(tmp_path / 'a.safetensors', change)
    for name in (None, 'cars'):
        other = classifier()
        assert_refused(other, tmp_path / 'a.safetensors', 'does not fit: by its method', name=name)
        load_adapter(other, tmp_path / 'a.safetensors', strict=False, name=name)
        fresh = classifier()
        inject(fresh)
        skipped = ('layers.0.adapter_attention.up.bias', 'layers.1.adapter_attention.down.bias')
        for key, value in other.backbone.state_dict().items():
            source = fresh if key in skipped else model
            if key != skipped[1]:  # drawn at random
                assert torch.equal(value, source.backbone.state_dict()[key]), key
            else:
                assert value.shape == source.backbone.state_dict()[key].shape


def test_a_huge_method_is_refused_whatever_is_asked_for(tmp_path):
    save_adapter(trained(), tmp_path / 'a.safetensors')
    content, tensors = read_adapter(tmp_path / 'a.safetensors')
    content['method']['bottleneck'] = 10**6
    write_adapter(tmp_path / 'a.safetensors', content, tensors)
    assert_refused(classifier(), tmp_path / 'a.safetensors', 'does not fit: by its method', strict=False)


def test_parts_need_a_name(tmp_path):
    save_adapter(trained(), tmp_path / 'a.safetensors')
    for model in (classifier(), trained()):
        with pytest.raises(ValueError, match=r'`parts` \(head\) belong to a new adapter: give its `name`, too'):
            head = dict(type='LinearClsHead', num_classes=10, in_channels=32)
            load_adapter(model, tmp_path / 'a.safetensors', parts=dict(head=head))


def test_a_head_may_have_adapter_in_its_names(tmp_path):
    """Counted as a head, and kept in files."""

    def build():
        model = classifier()
        torch.manual_seed(0)
        model.head.adapter_fc = torch.nn.Linear(32, 7)
        model.adapter_head = torch.nn.Linear(3, 2)
        return model

    plain = summarize(build())
    assert plain.adapters == 0 and plain.parts['adapter_head'] == (8, 8) and plain.parts['head'] == (561, 561)
    model = build()
    summary = inject(model)
    counted = sum(p.numel() for n, p in model.backbone.named_parameters() if 'adapter' in n)
    assert summary.adapters == counted and summary.parts['head'] == (561, 561)
    trained = sum(p.numel() for p in model.backbone.parameters() if p.requires_grad)
    assert summary.backbone_share == trained / summary.backbone
    stir(model)
    with torch.no_grad():
        model.head.adapter_fc.weight.add_(1)
    save_adapter(model, tmp_path / 'a.safetensors')
    other = build()
    load_adapter(other, tmp_path / 'a.safetensors')
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
