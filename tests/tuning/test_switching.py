"""Several adapters on one base."""

import copy

import pytest
import torch
from families import FAMILIES, image, stir
from mmengine.model import MMDistributedDataParallel
from small_classifiers import classifier, logits, same

from iconformer_mm import (
    active_adapter,
    add_adapter,
    delete_adapter,
    disabled,
    inject,
    list_adapters,
    load_adapter,
    remove,
    save_adapter,
    set_adapter,
    summarize,
)
from iconformer_mm.checkpoint import AdapterFileError
from iconformer_mm.checkpoint.adapter_file import read_adapter
from iconformer_mm.tuning import get_injection

FIVE = dict(head=dict(type='LinearClsHead', num_classes=5, in_channels=32))


@pytest.mark.parametrize('family', FAMILIES, ids=str)
def test_switching_and_disabling_is_exact(family):
    torch.manual_seed(0)
    base = family.build()
    base.eval()  # which of mmpretrain returns nothing
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    x = image(family.sizes[0])
    expected = {None: base(x)}
    model = copy.deepcopy(base)
    keys = set(model.state_dict())
    for name, method in (('a', dict(type='icon', bottleneck=8)), ('b', dict(type='adaptformer', bottleneck=4))):
        single = copy.deepcopy(base)  # the truth: a model with this adapter alone
        inject(single, method)
        stir(single)
        single.eval()
        expected[name] = single(x)
        add_adapter(model, name, method)
        set_adapter(model, name)
        get_injection(model).adapters[name].load({n: p for n, p in single.named_parameters() if 'adapter' in n})
    model.eval()
    registered = set(model.state_dict())
    assert not same(expected['a'], expected[None])
    for name in ('a', 'b', 'a'):
        set_adapter(model, name)
        with disabled(model):
            assert same(model(x), expected[None]) and set(model.state_dict()) == registered
        assert same(model(x), expected[name])
        with disabled(model), disabled(model):
            pass
        assert active_adapter(model) == name
        assert summarize(model).num_sites == family.num_blocks
    delete_adapter(model, 'a')
    assert active_adapter(model) is None and same(model(x), expected[None])
    set_adapter(model, 'b')
    delete_adapter(model, 'b')
    assert list_adapters(model) == [] and same(model(x), expected[None]) and set(model.state_dict()) == keys
    inject(model)  # free again


def two_tasks(tmp_path):
    """A base with files of two tasks, and what each task's own model answers."""
    answers = {}
    for name, method, num_classes in (('ten', 'icon', 10), ('five', 'adaptformer', 5)):
        single = classifier(num_classes)
        inject(single, method)
        stir(single)
        with torch.no_grad():
            single.head.fc.weight.add_(0.1 * len(name))
            single.neck.bn.running_mean.add_(len(name))
        save_adapter(single, tmp_path / f'{name}.safetensors', task=name, classes=[str(n) for n in range(num_classes)])
        answers[name] = logits(single)
    return answers


def test_one_base_serves_two_tasks_with_their_heads(tmp_path):
    answers = two_tasks(tmp_path)
    model = classifier()
    base = {name: id(p) for name, p in model.backbone.named_parameters()}
    content = load_adapter(model, tmp_path / 'ten.safetensors', name='ten')
    assert content['task'] == 'ten' and content['classes'][-1] == '9'
    load_adapter(model, tmp_path / 'five.safetensors', name='five', parts=FIVE)
    assert list_adapters(model) == ['ten', 'five'] and active_adapter(model) == 'ten'
    for name in ('ten', 'five', 'five', 'ten'):
        set_adapter(model, name)
        assert torch.equal(logits(model), answers[name])
    own = {name: id(p) for name, p in model.backbone.named_parameters() if 'adapter' not in name}
    assert own == base  # the very same tensors, nothing copied


def test_loading_and_saving_an_adapter_activates_nothing(tmp_path, monkeypatch):
    """An inactive adapter takes a file, and gives it again, while the active one serves."""
    model = classifier()
    add_adapter(model, 'three', 'lora')
    stir(model)
    add_adapter(model, 'five', 'icon', parts=FIVE)
    stir(model, seed=3)
    set_adapter(model, 'five')
    logits(model)
    save_adapter(model, tmp_path / 'five.safetensors')
    five = logits(model)
    set_adapter(model, 'three')
    three, trained = logits(model), {n for n, p in model.named_parameters() if p.requires_grad}

    monkeypatch.setattr(type(get_injection(model)), 'activate', None)  # calling it is an error
    load_adapter(model, tmp_path / 'five.safetensors', name='again', parts=FIVE)
    assert active_adapter(model) == 'three' and same(logits(model), three)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    for name in ('five', 'again'):
        save_adapter(model, tmp_path / 'copy.safetensors', name=name)
        (content, tensors), (wanted, expected) = map(
            read_adapter, (tmp_path / 'copy.safetensors', tmp_path / 'five.safetensors')
        )
        assert content['method'] == wanted['method'] and content['sites'] == wanted['sites']
        assert tensors.keys() == expected.keys() and all(torch.equal(tensors[n], expected[n]) for n in expected)
    with pytest.raises(ValueError, match="no adapter 'six'; there are: three, five, again"):
        save_adapter(model, tmp_path / 'six.safetensors', name='six')
    monkeypatch.undo()
    set_adapter(model, 'again')
    assert same(logits(model), five)


def test_a_file_that_does_not_fit_changes_nothing(tmp_path):
    answers = two_tasks(tmp_path)
    model = classifier()
    with pytest.raises(AdapterFileError, match='of another shape.*`parts`'):
        load_adapter(model, tmp_path / 'five.safetensors', name='five')
    assert list_adapters(model) == [] and 'adapter' not in ''.join(model.state_dict())
    load_adapter(model, tmp_path / 'ten.safetensors')
    head = model.head
    with pytest.raises(AdapterFileError, match='of another shape'):
        load_adapter(model, tmp_path / 'five.safetensors', name='five')
    assert list_adapters(model) == ['default'] and model.head is head
    assert torch.equal(logits(model), answers['ten'])


def test_training_one_leaves_the_others(tmp_path):
    answers = two_tasks(tmp_path)
    model = classifier()
    load_adapter(model, tmp_path / 'ten.safetensors', name='ten')
    add_adapter(model, 'new', 'icon', bottleneck=4)
    set_adapter(model, 'new')
    model.train()
    assert model.backbone.layers[0].adapter_attention.training and model.head.training
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(2):
        model.head.loss(model.extract_feat(image((64, 64))), _samples()).get('loss').backward()
        optimizer.step()
    assert model.backbone.layers[0].adapter_attention.up.weight.abs().sum() > 0
    set_adapter(model, 'ten')
    assert torch.equal(logits(model), answers['ten'])


def _samples():
    from mmpretrain.structures import DataSample

    return [DataSample().set_gt_label(i % 2) for i in range(len(image((64, 64))))]


def test_copies_and_half_precision_carry_all_adapters(tmp_path):
    answers = two_tasks(tmp_path)
    model = classifier()
    load_adapter(model, tmp_path / 'ten.safetensors', name='ten')
    load_adapter(model, tmp_path / 'five.safetensors', name='five', parts=FIVE)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    set_adapter(model, 'five')
    assert torch.equal(logits(model), answers['five'])
    set_adapter(twin, 'five')
    assert not torch.equal(logits(twin), answers['five'])  # its base is zero
    twin = copy.deepcopy(model).double()
    set_adapter(twin, 'ten')
    assert twin.backbone.layers[0].adapter_attention.up.weight.dtype == torch.float64


def test_remove_takes_all_of_them_out():
    model = classifier()
    before = logits(model)
    keys = list(model.state_dict())
    inject(model)
    add_adapter(model, 'second')
    remove(model)
    assert list(model.state_dict()) == keys and torch.equal(logits(model), before)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ('act', 'message'),
    [
        (lambda m: set_adapter(m, 'x'), "there is no adapter 'x'; there are: default"),
        (lambda m: delete_adapter(m, 'x'), "there is no adapter 'x'"),
        (lambda m: add_adapter(m, 'default'), "there already is an adapter 'default'"),
        (lambda m: add_adapter(m, 'x', 'lora2'), "unknown PEFT method 'lora2'"),
        (lambda m: add_adapter(m, 'x', 'full'), "method 'full' changes the base itself"),
        (
            lambda m: add_adapter(m, 'x', parts=dict(tail=dict())),
            "no part 'tail' outside its backbone",
        ),
    ],
)
def test_mistakes_change_nothing(act, message):
    model = classifier()
    inject(model)
    with pytest.raises(ValueError, match=message):
        act(model)
    assert list_adapters(model) == ['default'] and active_adapter(model) == 'default'


def test_unadapted_and_wrapped_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match='ImageClassifier is not adapted'):
        set_adapter(classifier(), 'x')
    model = classifier()
    inject(model)
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        wrapped = MMDistributedDataParallel(model)
        with pytest.raises(ValueError, match='change the bare model'):
            set_adapter(wrapped, 'default')
    finally:
        torch.distributed.destroy_process_group()
