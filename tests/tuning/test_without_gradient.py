"""Towers that their host runs without gradients are refused."""

import pytest
import small_segmentors
import torch
from torch import nn
from tower_models import build

from iconformer_mm import inject
from iconformer_mm.tuning import get_injection
from iconformer_mm.tuning.without_gradient import find_without_gradient


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
