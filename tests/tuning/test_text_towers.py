"""Methods in text encoders, and in a detector that reads text."""

import copy
import functools
import tempfile
from pathlib import Path

import pytest
import small_detectors
import torch
from small_bert import write_bert
from tower_models import need_transformers

from iconformer_mm import add_adapter, disabled, inject, load_adapter, merge, remove, save_adapter, set_adapter
from iconformer_mm.tuning.freezing import is_adapter

TOWERS = ['backbone', 'language_model', 'encoder', 'decoder']
OTHERS = TOWERS[1:]
CLASSES = ('circle', 'square', 'small triangle')


@functools.lru_cache
def built():
    need_transformers('Grounding DINO')
    folder = Path(tempfile.mkdtemp(prefix='bert-'))
    model = small_detectors.build(small_detectors.grounding_dino(write_bert(folder)))
    small_detectors.predict(model, data())
    return model


@functools.lru_cache
def data(text=CLASSES):
    return small_detectors.batch(text=text)


def detector():
    return copy.deepcopy(built())


def frozen_predictions():
    model = detector()
    inject(model, 'frozen', where=TOWERS, freeze=['*'])
    return small_detectors.predict(model, data())


def same(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other))


def train(model, steps=2):
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        small_detectors.losses(model, data()).backward()
        assert [n for n, p in trained.items() if p.grad is None] == []
        optimizer.step()
    return set(trained)


def wake(model, seed=1):
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name) and parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=random) * 0.1)


RECIPES = {
    'LoRA on all': dict(method='lora', rank=2, where=TOWERS, targets=['q', 'k', 'v', 'o', 'fc1', 'fc2']),
    'iCoN and LoRA': dict(
        methods=[dict(where='backbone', type='icon', bottleneck=4), dict(where=OTHERS, type='lora', rank=2)]
    ),
    'others': dict(
        methods=[
            dict(where='backbone', type='norm'),
            dict(where='language_model', type='adapter', bottleneck=4),
            dict(where='encoder', type='bitfit'),
            dict(where='decoder', type='dora', rank=2),
        ]
    ),
    'AdaptFormer in BERT': dict(methods=[dict(where='language_model', type='adaptformer', bottleneck=4, dropout=0)]),
}


@pytest.mark.parametrize('recipe', RECIPES)
def test_grounding_dino(recipe, tmp_path):
    model, expected = detector(), frozen_predictions()
    stock, keys = small_detectors.predict(model, data()), list(model.state_dict())
    before = {n: v.clone() for n, v in model.state_dict().items()}
    where = TOWERS if recipe != 'AdaptFormer in BERT' else ['language_model']
    summary = inject(model, **RECIPES[recipe], freeze=['*'])
    assert set(summary.towers) == set(where) and all(tower.trained for tower in summary.towers.values())
    if where == TOWERS:
        assert same(small_detectors.predict(model, data()), expected)
    trained = train(model)
    assert all(map(is_adapter, trained))
    assert [n for n in keys if not torch.equal(before[n], model.state_dict()[n])] == []
    tuned = small_detectors.predict(model, data())
    assert not same(tuned, expected)
    with disabled(model):  # the zero-shot detector
        if where == TOWERS:
            assert same(small_detectors.predict(model, data()), expected)

    save_adapter(model, tmp_path / 'a.safetensors')
    fresh = detector()
    load_adapter(fresh, tmp_path / 'a.safetensors')
    assert same(small_detectors.predict(fresh, data()), tuned)
    remove(model)
    assert list(model.state_dict()) == keys and same(small_detectors.predict(model, data()), stock)


def test_fusion_layers_have_queries_keys_and_values():
    model = detector()
    inject(model, 'lora', where='encoder.fusion_layers', targets=['q', 'k', 'v', 'o'])
    attention = model.encoder.fusion_layers[0].attn
    roles = {n: list(layer.adapter.a) for n, layer in attention.named_children() if hasattr(layer, 'adapter')}
    assert roles == dict(
        v_proj=['q'], l_proj=['k'], values_v_proj=['v'], values_l_proj=['v'], out_v_proj=['o'], out_l_proj=['o']
    )


def test_a_merged_text_tower_equals_the_adapted_one():
    model = detector()
    inject(model, 'lora', where='language_model', targets=['q', 'k', 'v', 'o', 'fc1', 'fc2'])
    wake(model)
    expected = small_detectors.losses(model, data())
    merge(model)
    torch.testing.assert_close(small_detectors.losses(model, data()), expected, rtol=1e-4, atol=1e-4)


def test_several_customers_on_one_detector():
    model = detector()
    seen = {}
    for number, name in enumerate(('one', 'two', 'three')):
        add_adapter(model, name, 'lora', where=TOWERS, rank=2, freeze=['*'])
        set_adapter(model, name)
        wake(model, number)
        seen[name] = small_detectors.predict(model, data())
    for name, expected in seen.items():
        set_adapter(model, name)
        assert same(small_detectors.predict(model, data()), expected)
    assert not same(seen['one'], seen['two'])


def test_phrases_are_another_prompt():
    model = detector()
    inject(model, 'lora', where=TOWERS, freeze=['*'])
    assert len(small_detectors.predict(model, data(('a large square', 'circle')))) == 6


def test_icon_on_text_is_refused():
    model = detector()
    with pytest.raises(ValueError, match="'language_model': method 'icon' .* those of BertModel lie on none"):
        inject(model, 'icon', where=['backbone', 'language_model'])


def test_bert_has_the_weights_that_it_was_built_with():
    model = detector()
    inject(model, 'lora', where='language_model')
    (account,) = model.language_model._peft_injection.accounts.values()
    assert account.missing == []


def test_a_clip_text_tower():
    transformers = pytest.importorskip('transformers', reason='CLIP is that of transformers (extra "text")')
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=20, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model = torch.nn.ModuleDict(dict(text_encoder=transformers.CLIPTextModel(config))).eval()
    ids = torch.randint(0, 20, (2, 8))
    expected = model.text_encoder(ids).last_hidden_state
    summary = inject(model, 'lora', where='text_encoder', targets=['q', 'k', 'v', 'o', 'fc1', 'fc2'], rank=2)
    assert summary.num_sites == 12 and torch.equal(model.text_encoder(ids).last_hidden_state, expected)
    wake(model)
    out = model.text_encoder(ids).last_hidden_state
    assert not torch.equal(out, expected)
    out.square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    merge(model)
    torch.testing.assert_close(model.text_encoder(ids).last_hidden_state, out, rtol=1e-4, atol=1e-5)
