"""Towers that their host runs without gradients are refused."""

import pytest
import small_segmentors
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from tower_models import build

from iconformer_mm import inject
from iconformer_mm.tuning import get_injection
from iconformer_mm.tuning.without_gradient import GradientWatch, find_without_gradient


@pytest.mark.parametrize('where', ['text_encoder', 'text_encoder.transformer', 'text_encoder.transformer.0'])
@pytest.mark.parametrize('method', ['lora', 'bitfit'])
def test_a_text_encoder_under_no_grad(where, method):
    model = build('SAN')
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="train nothing in 'text_encoder.*': CLIPTextEncoder.encode_text runs"):
        inject(model, method, where=['image_encoder', where])
    assert get_injection(model) is None and list(model.state_dict()) == keys
    inject(model, methods=[dict(where='image_encoder', type=method), dict(where=where, type='frozen')])


def test_attention_whose_weights_are_read_from_outside():
    model = small_segmentors.build(small_segmentors.san(cross_attn=True))
    with pytest.raises(ValueError, match='RecWithAttnbias with cross_attn=True reads the weights of its attention'):
        inject(model, 'lora', where='decode_head.rec_with_attnbias')


class Helped(nn.Module):
    """With a method under no_grad that computes no features, and one that ``forward`` does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)

    @torch.no_grad()
    def positions(self, x: torch.Tensor) -> torch.Tensor:
        return torch.arange(x.shape[-1])

    @torch.no_grad()
    def generate(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x) + self.positions(x)


class Inference(Helped):
    @torch.inference_mode()
    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.features(x)


def test_only_what_forward_reaches_and_computes_features():
    model = nn.ModuleDict(dict(decoder=Helped(), encoder=Inference()))
    assert list(find_without_gradient(model)) == ['encoder.q_proj']
    inject(model, 'lora', where='decoder')


# What runs


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x)


def watched():
    model = nn.ModuleDict(dict(encoder=Layer(), decoder=Layer()))
    inject(model, 'lora', where=['encoder', 'decoder'])
    watch = GradientWatch(get_injection(model).learning_modules())
    return model, watch


def step(watch, loss):
    watch.begin()
    loss().sum().backward()
    watch.end()


def in_no_grad(layer, x):
    with torch.no_grad():
        return layer(x)


RUNS = {
    'under no_grad': in_no_grad,
    'detached': lambda layer, x: layer(x).detach(),
    'checkpointed without a gradient': lambda layer, x: checkpoint(layer, x.detach(), use_reentrant=True),
}


@pytest.mark.parametrize('run', RUNS)
def test_a_tower_to_which_no_gradient_comes_back(run):
    model, watch = watched()
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match="^no gradient comes back to 'encoder', so nothing is trained there"):
        step(watch, lambda: model.decoder(x) + RUNS[run](model.encoder, x))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_tower_waits_for_the_first_step_that_runs_it():
    """Such as the head of another task. A validation is no step."""
    model, watch = watched()
    x = torch.ones(2, 4)
    step(watch, lambda: model.encoder(x))
    in_no_grad(model.decoder, x)
    step(watch, lambda: model.encoder(x))
    with pytest.raises(ValueError, match="no gradient comes back to 'decoder'"):
        step(watch, lambda: model.encoder(x) + in_no_grad(model.decoder, x))


def test_gradients_that_come_back():
    """Through recomputed layers, and to modules that also run without gradients in the step."""
    model, watch = watched()
    x = torch.ones(2, 4, requires_grad=True)
    step(
        watch,
        lambda: checkpoint(model.encoder, x, use_reentrant=True) + model.decoder(in_no_grad(model.decoder, x)).square(),
    )
    assert not any(module._forward_hooks for module in model.modules())
    step(watch, lambda: model.encoder(x) + in_no_grad(model.decoder, x))  # observed once


def test_what_is_observed_can_be_released():
    model, watch = watched()
    watch.release()
    step(watch, lambda: model.encoder(torch.ones(2, 4)).detach() + torch.ones(1, requires_grad=True))
