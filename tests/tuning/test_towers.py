"""Methods beyond the backbone: encoders, decoders and heads of detectors, each with a method of its own."""

import contextlib
import copy
import threading

import pytest
import small_detectors
import torch
import tower_models
from torch import nn
from tower_models import need_transformers, same, wake

from iconformer_mm import (
    add_adapter,
    disabled,
    inject,
    load_adapter,
    merge,
    mixed,
    remove,
    save_adapter,
    set_adapter,
    summarize,
    unmerge,
)
from iconformer_mm.checkpoint import read_adapter
from iconformer_mm.tuning import get_injection
from iconformer_mm.tuning.accounting import describe_training
from iconformer_mm.tuning.freezing import is_adapter
from iconformer_mm.tuning.where import find_towers

LAYERS = ['encoder', 'decoder']
MODELS = [name for name, model in tower_models.MODELS.items() if not model.reads_text]
EVERYTHING = ['q', 'k', 'v', 'o', 'fc1', 'fc2']


def model_of(name):
    return tower_models.build(name), tower_models.data(name), list(tower_models.MODELS[name].towers)


def frozen_predictions(name):
    """Those of the frozen model: attention of torch rounds otherwise where its weights need no gradient."""
    kind, model = tower_models.MODELS[name], tower_models.build(name)
    inject(model, 'frozen', where=kind.all_towers, freeze=kind.freeze)
    return tower_models.predict(name, model)


def towers(where, backbone='backbone'):
    return [dict(where=backbone, type='icon', bottleneck=4), dict(where=where, type='lora', rank=2)]


def bits(model):
    return {n: v.detach().clone() for n, v in model.state_dict().items()}


def only(batch, number):
    """One sample of a batch."""
    return {key: values[number : number + 1] for key, values in batch.items()}


# The invariants, on every model


@pytest.mark.parametrize('name', [*MODELS, 'GLIP'])
def test_towers_start_exact_train_only_adapters_and_go(name, tmp_path):
    """With iCoN in the backbone and LoRA in the others; tests/towers_table.py tries each method in each tower."""
    need_transformers(name)
    model, _, where = model_of(name)
    kind = tower_models.MODELS[name]
    before, keys = bits(model), list(model.state_dict())
    grads = {n: p.requires_grad for n, p in model.named_parameters()}
    stock, expected = tower_models.predict(name, model), frozen_predictions(name)
    summary = inject(model, methods=towers(where, kind.backbone), freeze=kind.freeze)
    assert same(tower_models.predict(name, model), expected)
    assert [tower.method for tower in summary.towers.values()] == ['icon', *['lora'] * len(where)]
    assert summary.trainable == summary.adapters == sum(tower.trained for tower in summary.towers.values())

    trained = tower_models.train(name, model)
    assert all(map(is_adapter, trained)) and all(any(n.startswith(f'{path}.') for n in trained) for path in where)
    after = bits(model)
    assert [n for n in keys if not torch.equal(before[n], after[n])] == []
    tuned = tower_models.predict(name, model)
    assert not same(tuned, expected)
    with disabled(model):
        assert same(tower_models.predict(name, model), expected)

    path = tmp_path / 'adapter.safetensors'
    save_adapter(model, path)
    fresh, _, _ = model_of(name)
    load_adapter(fresh, path)
    assert same(tower_models.predict(name, fresh), tuned)
    assert describe_training(get_injection(fresh)) == describe_training(get_injection(model))

    remove(model)
    # DDQ registers branches of its head in its decoder when it is trained, adapted or not.
    assert [n for n in model.state_dict() if not n.startswith('decoder.aux_reg_branches')] == keys
    assert same(tower_models.predict(name, model), stock)
    parameters = dict(model.named_parameters())
    assert {n: parameters[n].requires_grad for n in grads} == grads


@pytest.mark.parametrize('name', ['DINO', 'DETR', 'Mask2Former'])
@pytest.mark.parametrize('method', ['lora', 'dora', 'bitfit', 'ssf'])
def test_merged_towers_equal_the_adapted_ones(name, method):
    model, batch, where = model_of(name)
    options = dict(targets=EVERYTHING) if method == 'lora' else {}
    base = bits(model)
    inject(model, method, where=['backbone', *where], **options)
    wake(model)
    expected, weights = small_detectors.losses(model, batch), bits(model)
    merge(model)
    assert get_injection(model) is None
    torch.testing.assert_close(small_detectors.losses(model, batch), expected, rtol=1e-4, atol=1e-4)
    unmerge(model)
    assert same(list(bits(model).values()), list(weights.values()))
    remove(model)
    assert all(torch.equal(base[n], v) for n, v in bits(model).items())


@pytest.mark.parametrize('name', ['DINO', 'DETR'])
def test_adapters_survive_the_initialisation_of_their_host(name):
    """Which draws all matrices in encoder and decoder anew when a run begins."""
    model, batch, where = model_of(name)
    inject(model, methods=towers(where))
    adapters = {n: p.detach().clone() for n, p in model.named_parameters() if is_adapter(n)}
    matrix = model.encoder.layers[0].ffn.layers[1].weight.detach().clone()
    copied = copy.deepcopy(model)
    for each in (model, copied):
        each.init_weights()
        assert not torch.equal(each.encoder.layers[0].ffn.layers[1].weight, matrix)
        assert all(torch.equal(each.get_parameter(n), p) for n, p in adapters.items())
    remove(model)
    assert 'init_weights' not in vars(model)


# An independent truth


def test_lora_in_a_detr_is_the_sum_of_the_weights():
    model, batch, _ = model_of('DETR')
    inject(model, 'lora', where=['encoder', 'decoder'], rank=2, alpha=3, targets=['q', 'k', 'v', 'o', 'fc1', 'fc2'])
    wake(model)
    adapted = small_detectors.losses(model, batch)
    plain, _, _ = model_of('DETR')
    with torch.no_grad():
        for name, module in model.named_modules():
            adapter = getattr(module, 'adapter', None)
            if adapter is None:
                continue
            rows = {weight: [] for weight in adapter.names}
            for weight, targets in adapter.targets.items():
                rows[weight] = [1.5 * adapter.b[t.role] @ adapter.a[t.role] for t in targets]
                plain.get_parameter(f'{name}.{weight}').add_(torch.cat(rows[weight]))
    torch.testing.assert_close(small_detectors.losses(plain, batch), adapted, rtol=1e-5, atol=1e-5)


def test_icon_in_a_deformable_encoder_filters_each_level():
    from iconformer_mm.adapters import TokenGrid

    model, batch, _ = model_of('Deformable DETR')
    inject(model, 'icon', where='encoder', bottleneck=4)
    wake(model)
    attention = model.encoder.layers[0].self_attn
    seen = {}
    handle = attention.register_forward_hook(
        lambda module, args, kwargs, out: seen.update(kwargs, out=out), with_kwargs=True
    )
    small_detectors.predict(model, batch)
    handle.remove()
    adapter = attention.adapter
    remove(model)
    x, sizes = seen['query'], seen['spatial_shapes'].tolist()
    assert len(sizes) == 4
    start, expected = 0, attention(**{k: v for k, v in seen.items() if k != 'out'})
    for height, width in sizes:
        level = x[:, start : start + height * width]
        expected[:, start : start + height * width] += adapter(level, TokenGrid(height, width))
        start += height * width
    torch.testing.assert_close(seen['out'], expected)


def test_an_adapter_reads_and_joins_the_ffn():
    model, batch, _ = model_of('DETR')
    for method in ('adaptformer', 'adapter'):
        inject(model, method, where='decoder', bottleneck=4)
        wake(model)
        ffn = model.decoder.layers[1].ffn
        seen = {}
        handle = ffn.register_forward_hook(lambda _, args, out, seen=seen: seen.update(x=args[0], out=out))
        small_detectors.predict(model, batch)
        handle.remove()
        adapter = ffn.adapter
        remove(model)
        x, branch = seen['x'], ffn.layers(seen['x'])
        reads = x if method == 'adaptformer' else branch
        torch.testing.assert_close(seen['out'], x + branch + adapter(reads, None), rtol=1e-5, atol=1e-5)


def test_an_adapter_reads_the_residual_before_the_norm():
    """Layers of CLIP in SAN: FFN(norm(x)) + x, where AdaptFormer reads x, and what is parallel to the FFN its norm."""
    for number, input in enumerate(('residual', 'normed')):
        model, batch, _ = model_of('SAN')
        inject(model, 'adaptformer', where='decode_head.rec_with_attnbias', bottleneck=4, input=input)
        wake(model)
        layer = model.decode_head.rec_with_attnbias.layers[0]
        seen = {}
        handle = layer.ffns[0].register_forward_hook(lambda _, args, out, seen=seen: seen.update(args=args, out=out))
        tower_models.predict('SAN', model)
        handle.remove()
        adapter = layer.ffns[0].adapter
        remove(model)
        normed, residual = seen['args'][:2]
        assert torch.equal(layer.norms[1](residual), normed) and not torch.equal(normed, residual)
        expected = layer.ffns[0](normed, residual) + adapter((residual, normed)[number], None)
        torch.testing.assert_close(seen['out'], expected, rtol=1e-5, atol=1e-6)


def test_scales_of_positions_are_no_ffn():
    model, _, _ = model_of('DAB-DETR')
    inject(model, 'lora', where='decoder', targets=['fc1', 'fc2'])
    assert {n.partition('.adapter.')[0] for n, _ in model.decoder.named_parameters() if is_adapter(n)} == {
        f'layers.{number}.ffn.layers.{layer}' for number in (0, 1) for layer in ('0.0', '1')
    }


def test_queries_come_before_the_patches_of_a_side_adapter_network():
    from iconformer_mm.adapters import TokenGrid

    model, batch, _ = model_of('SAN')
    inject(model, 'icon', where='decode_head.side_adapter_network', bottleneck=4)
    wake(model)
    attention = model.decode_head.side_adapter_network.encode_layers[0].attn
    seen = {}
    handle = attention.register_forward_hook(
        lambda module, args, kwargs, out: seen.update(args=args, kwargs=kwargs, out=out), with_kwargs=True
    )
    tower_models.predict('SAN', model)
    handle.remove()
    adapter = model.decode_head.side_adapter_network.encode_layers[0].adapter_attention
    remove(model)
    x = seen['args'][0]
    assert x.shape[1] == 4 + 4 * 6  # queries, and patches of 16 x 16 pixels
    expected = attention(*seen['args'], **seen['kwargs']) + adapter(x, TokenGrid(4, 6, num_prefix_tokens=4))
    torch.testing.assert_close(seen['out'], expected)


@pytest.mark.parametrize('name', ['DINO', 'Mask2Former', 'SAN'])
def test_layers_of_towers_are_recomputed(name):
    """Gradients are the same, also when adapters are disabled, or another is active, in the backward pass."""
    kind, found = tower_models.MODELS[name], []
    for with_cp in (False, True):
        model = tower_models.build(name)
        methods = towers(list(kind.towers), kind.backbone)
        forward = {n for n, m in model.named_modules() if 'forward' in vars(m)}
        torch.manual_seed(0)
        inject(model, methods=methods, freeze=kind.freeze, with_cp=with_cp)
        wake(model)
        ffn = next(m for n, m in model.named_modules() if n.startswith(kind.towers[-1]) and type(m).__name__ == 'FFN')
        calls = []
        ffn.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        total = tower_models.losses(name, model)
        before = len(calls)
        with disabled(model):
            total.backward()
        assert len(calls) == (2 if with_cp else 1) * before
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        remove(model)
        assert {n for n, m in model.named_modules() if 'forward' in vars(m)} == forward
    assert found[0].keys() == found[1].keys()
    for n, gradient in found[0].items():
        torch.testing.assert_close(found[1][n], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, n=n: f'{n}: {text}')


# What is trained


def test_what_lies_in_no_tower_is_trained_unless_frozen():
    model, _, _ = model_of('DINO')
    inject(model, 'lora', where=['encoder'])
    trained = {n.partition('.')[0] for n, p in model.named_parameters() if p.requires_grad}
    assert {'backbone', 'neck', 'decoder', 'bbox_head'} <= trained
    assert not any(p.requires_grad for n, p in model.encoder.named_parameters() if not is_adapter(n))
    remove(model)
    inject(model, 'lora', where=['encoder'], freeze=['backbone', 'neck.*', 'decoder'])
    trained = {n.partition('.')[0] for n, p in model.named_parameters() if p.requires_grad}
    assert 'bbox_head' in trained and not {'backbone', 'neck', 'decoder'} & trained


def test_a_head_is_adapted_like_any_tower():
    model, batch, _ = model_of('DINO')
    inject(model, methods=[dict(where='bbox_head', type='lora', targets=['other'], rank=2)], freeze=['*'])
    trained = tower_models.train('DINO', model)
    assert trained and all(n.startswith('bbox_head.') and is_adapter(n) for n in trained)


def test_alike_methods_are_one_method():
    model, _, _ = model_of('DETR')
    inject(model, methods=[dict(where='encoder', type='lora'), dict(where='decoder', type='lora', rank=8)])
    assert get_injection(model).method.config == dict(
        type='lora', rank=8, alpha=8, targets=['q', 'v'], dropout=0.0, rank_stabilized=False
    )
    remove(model)
    inject(model, 'lora', backbones=['encoder', 'decoder'])
    assert get_injection(model).selection.backbones == ('encoder', 'decoder')


def test_patterns_name_the_outermost_modules():
    model, _, _ = model_of('DETR')
    assert find_towers(model, '*coder') == ('encoder', 'decoder')
    assert find_towers(model, ['decoder.layers.*', 'encoder']) == ('decoder.layers.0', 'decoder.layers.1', 'encoder')
    nested = nn.ModuleDict(dict(detector=model))
    assert find_towers(nested, 'backbone') == ('detector.backbone',)
    assert find_towers(model, 'decoder.layers.[12]') == ('decoder.layers.1',)


def test_the_summary_names_the_method_of_each_tower():
    model, _, where = model_of('DINO')
    text = str(inject(model, methods=towers(where)))
    assert 'backbone: icon, ' in text and 'encoder: lora, ' in text and '2 x MultiheadAttention' in text


def test_branches_of_the_head_in_the_decoder_of_ddq(tmp_path):
    """Which DDQ puts there when it is trained. They stay the head's: trained, and not a part of the decoder's base."""
    model, batch, _ = model_of('DDQ')
    inject(model, 'lora', where='decoder', rank=2)
    tower_models.train('DDQ', model)
    assert model.decoder.aux_reg_branches is model.bbox_head.aux_reg_branches
    assert all(p.requires_grad for p in model.bbox_head.aux_reg_branches.parameters())
    tuned = tower_models.predict('DDQ', model)
    save_adapter(model, tmp_path / 'a.safetensors')
    _, tensors = read_adapter(tmp_path / 'a.safetensors')
    assert {n for n in tensors if n.startswith('decoder.')} == {n for n in tensors if 'decoder' in n and is_adapter(n)}
    fresh, _, _ = model_of('DDQ')
    load_adapter(fresh, tmp_path / 'a.safetensors')
    assert same(tower_models.predict('DDQ', fresh), tuned)
    remove(model)
    summary = inject(model, 'lora', where='decoder', rank=2)  # now they are there from the beginning
    assert all(p.requires_grad for p in model.bbox_head.aux_reg_branches.parameters())
    assert summary.towers['decoder'].trained == sum(p.numel() for n, p in model.named_parameters() if is_adapter(n))


# Several adapters


def test_named_adapters_share_the_towers(tmp_path):
    model, batch, where = model_of('DINO')
    add_adapter(model, 'one', methods=towers(where), freeze=['*'])
    wake(model)
    one = small_detectors.predict(model, batch)
    add_adapter(model, 'two', methods=[dict(where='decoder', type='lora', rank=3)], freeze=['*'])
    set_adapter(model, 'two')
    assert [tower.method for tower in summarize(model).towers.values()] == ['frozen', 'frozen', 'lora']
    wake(model, seed=2)  # the active one's
    two = small_detectors.predict(model, batch)
    assert not same(one, two)
    save_adapter(model, tmp_path / 'two.safetensors')
    set_adapter(model, 'one')
    load_adapter(model, tmp_path / 'two.safetensors', name='again')
    set_adapter(model, 'again')
    assert same(small_detectors.predict(model, batch), two)
    with pytest.raises(ValueError, match="methods: 'neck' is not among the towers that are adapted"):
        add_adapter(model, 'three', 'lora', where='neck')


def test_a_mixed_batch_of_towers_equals_each_adapter_alone():
    model, batch, where = model_of('DINO')
    for number, name in enumerate(('one', 'two', 'three')):
        add_adapter(model, name, methods=towers(where), freeze=['*'])
        set_adapter(model, name)
        wake(model, number)
    alone = {}
    for name in ('one', 'two', 'three'):
        set_adapter(model, name)
        alone[name] = [small_detectors.predict(model, only(batch, number)) for number in range(2)]
    assert not same(alone['one'][0], alone['two'][0])
    for names in (['two', 'one'], ['one', 'three']):
        with mixed(model, names):
            found = small_detectors.predict(model, batch)
        assert same(found, [t for number, name in enumerate(names) for t in alone[name][number]])
    with disabled(model):
        base = small_detectors.predict(model, only(batch, 0))
    with mixed(model, [None, 'three']):
        found = small_detectors.predict(model, batch)
    assert same(found, [*base, *alone['three'][1]])
    more = {**batch, 'data_samples': [*batch['data_samples'], batch['data_samples'][0]]}
    with pytest.raises(ValueError, match='3 data samples were given for 2 images'), mixed(model, ['one', 'two']):
        small_detectors.predict(model, more)


@pytest.mark.parametrize('name', ['DINO', 'DDQ', 'Mask2Former', 'SAN', 'Grounding DINO', 'GLIP'])
def test_threads_run_adapters_of_their_own(name):
    need_transformers(name)
    model, batch, where = model_of(name)
    kind, alone = tower_models.MODELS[name], {}
    for number, adapter in enumerate(('one', 'two', None)):
        if adapter is not None:
            add_adapter(model, adapter, methods=towers(where, kind.backbone), freeze=kind.freeze)
            set_adapter(model, adapter)
            wake(model, number)
        with contextlib.nullcontext() if adapter else disabled(model):
            alone[adapter] = tower_models.predict(name, model)
    assert not same(alone['one'], alone['two'])
    # All threads leave the last tower before one goes on: what one has written there, another would read.
    meeting, right = threading.Barrier(len(alone), timeout=60), []

    def meet(*_):
        meeting.wait()

    model.get_submodule(where[-1]).register_forward_hook(meet)

    def work(adapter):
        for _ in range(2):
            with mixed(model, [adapter, adapter]):
                right.append(same(tower_models.predict(name, model), alone[adapter]))

    threads = [threading.Thread(target=work, args=(adapter,)) for adapter in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 6


def test_a_file_says_which_method_is_where(tmp_path):
    model, _, where = model_of('DETR')
    inject(model, methods=towers(where))
    save_adapter(model, tmp_path / 'a.safetensors')
    content, tensors = read_adapter(tmp_path / 'a.safetensors')
    assert content['backbones'] == ['backbone', *where]
    assert [(m['where'], m['type']) for m in content['method']['methods']] == [
        (['backbone'], 'icon'),
        (['encoder'], 'lora'),
        (['decoder'], 'lora'),
    ]
    assert 'encoder.layers.0.self_attn.attn.adapter.a.q' in tensors
    other, _, _ = model_of('DETR')
    inject(other, methods=[dict(where='backbone', type='icon'), dict(where=where, type='lora', rank=4)])
    with pytest.raises(ValueError, match='but the model is adapted by'):
        load_adapter(other, tmp_path / 'a.safetensors')


# Bad input


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(where='encodr'), r"no module of DETR with parameters fits 'encodr' \(did you mean 'encoder'"),
        (dict(where='text_*'), "fits 'text_\\*'; there is: 'backbone' \\(SwinTransformer\\), "),
        (dict(where=[]), "where must be a module's path or pattern, or a list of such"),
        (dict(where=['encoder', 'encoder.layers.0']), "'encoder.layers.0' lies within 'encoder', and both are named"),
        (dict(where='encoder', backbones=['decoder']), 'where and backbones both name the modules to adapt'),
        (dict(method='full', where='encoder'), "method 'full' trains the whole model as it is"),
        (dict(method='icon', where='decoder'), "method 'icon' filters tokens on the grid of an image, and those of"),
        (dict(method='icon', where='encoder'), "method 'icon' filters tokens on the grid of an image, and those of"),
        (dict(method='vpt', where='decoder'), "method 'vpt' needs the blocks of an image encoder"),
        (dict(method='partial', where='decoder'), "method 'partial' needs the blocks of an image encoder"),
        (dict(where='neck'), "method 'lora' finds no linear map q, v in ChannelMapper, which has no linear layers"),
        (dict(where='bbox_head'), r"finds no linear map q, v in DETRHead; set targets=\['other', 'fc1', 'fc2'\]"),
        (dict(where='decoder', blocks='last:1'), 'has no known Transformer blocks to choose among'),
        (dict(where='decoder', dropout=0.1), 'reads the weights of its layers, so dropout cannot be applied'),
        (dict(where='bbox_head', targets=['other'], with_cp=True), 'DETRHead has no list of layers; leave it out'),
        (dict(method='frozen', where='encoder', with_cp=True), "and method 'frozen' adapts none"),
        (dict(method='bitfit', where='backbone', with_cp=True), 'with_cp recomputes adapted blocks'),
        (dict(method=None, methods=[]), 'methods must be a list of dict\\(where='),
        (dict(method=None, methods=['lora']), "got 'lora' in it"),
        (dict(methods=[dict(type='lora')]), 'methods says what goes where, so method cannot be given beside it'),
        (
            dict(method=None, methods=[dict(where='encoder', type='lora'), dict(where=LAYERS, type='bitfit')]),
            "'encoder' is given two methods, 'lora' and 'bitfit'",
        ),
        (
            dict(
                method=None, methods=[dict(where='decoder', type='lora'), dict(where='decoder.layers.1', type='norm')]
            ),
            "'decoder.layers.1' lies within 'decoder', and a module takes one method",
        ),
        (
            dict(method=None, methods=[dict(where='encoder', type='lora'), dict(where='decoder', type='full')]),
            "'full' for 'decoder' trains all of it in place",
        ),
        (
            dict(method=None, methods=[dict(where='backbone', type='icon'), dict(where='decoder', type='vpt')]),
            "'decoder': method 'vpt' needs the blocks of an image encoder",
        ),
        (
            dict(method=None, methods=[dict(where='encoder', type='lora', rnak=2), dict(where='decoder', type='norm')]),
            "unknown option 'rnak' of PEFT method 'lora'",
        ),
    ],
)
def test_bad_input_leaves_the_model_untouched(options, message):
    model, _, _ = model_of('DETR')
    keys, grads = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        inject(model, **{'method': 'lora', **options})
    assert get_injection(model) is None and list(model.state_dict()) == keys
    assert [p.requires_grad for p in model.parameters()] == grads


def test_towers_with_icon_cannot_be_merged():
    model, _, where = model_of('DETR')
    inject(model, methods=towers(where))
    with pytest.raises(ValueError, match="method 'icon' cannot be merged"):
        merge(model)
