"""Grad-CAM against autograd without cutting the graph; attention against its formula."""

import numpy as np
import pytest
import torch
from families import FAMILIES, flatten, image
from trained_adapters import DIGITS, SCENES, digit, trained

from iconformer_mm.analysis.saliency import attention_map, find_block, grad_cam
from iconformer_mm.inference import AdapterInferencer


class Bare:
    """A backbone as an inferencer has its model."""

    def __init__(self, model):
        model.eval()
        self.model = model

    def __call__(self, images):
        with torch.no_grad():
            return self.model(images[0])


def by_autograd(model, block, score, prefix, shape):
    """Grad-CAM in plain loops, with the gradient that reached the block's input in the whole graph."""
    kept = []
    handle = block.register_forward_pre_hook(lambda m, args: (args[0].retain_grad(), kept.append(args[0]))[1])
    score(model).backward()
    handle.remove()
    values = kept[-1].detach()[0, prefix:].double().numpy()
    gradient = kept[-1].grad[0, prefix:].double().numpy()
    cam = np.zeros(len(values))
    for channel in range(values.shape[1]):
        cam += gradient[:, channel].sum() / len(gradient) * values[:, channel]
    cam = np.maximum(cam, 0)
    return (cam / cam.max()).reshape(shape)


@pytest.mark.parametrize('name', [None, 'layers.1'])
def test_grad_cam_of_a_classifier(name, root, tmp_path):
    trained(root, DIGITS, tmp_path / 'a.safetensors')
    inferencer = AdapterInferencer(root / DIGITS, tmp_path / 'a.safetensors', device='cpu')
    block = inferencer.model.backbone.layers[3 if name is None else 1]
    before = {n: v.clone() for n, v in inferencer.model.state_dict().items()}
    actual = grad_cam(inferencer, digit(), name)

    def score(model):
        data = model.data_preprocessor(dict(inputs=[torch.from_numpy(digit())[None]]))
        return model(data['inputs'], mode='tensor')[0].sort().values[-1]

    expected = by_autograd(inferencer.model, block, score, 1, (7, 7))
    np.testing.assert_allclose(actual, expected, atol=1e-4)
    assert actual.max() == 1 and actual.min() >= 0 and actual.std() > 0.05
    assert not block._forward_pre_hooks and not block._forward_hooks
    assert all(torch.equal(v, before[n]) for n, v in inferencer.model.state_dict().items())


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('task', ['depth', 'semantic'])
def test_grad_cam_of_dense_tasks(task, root, tmp_path):
    trained(root, SCENES[task], tmp_path / 'a.safetensors')
    inferencer = AdapterInferencer(root / SCENES[task], tmp_path / 'a.safetensors', device='cpu')
    photo = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    name = 'stages.2.blocks.1'

    def score(model):
        data = model.data_preprocessor(dict(inputs=[torch.from_numpy(photo).permute(2, 0, 1)]))
        out = model(data['inputs'], mode='tensor')
        if task == 'depth':
            return torch.nn.functional.interpolate(out, (96, 128), mode='bilinear').sum()
        out = torch.nn.functional.interpolate(out, (96, 128), mode='bilinear')[0]
        classes = out.argmax(dim=0)
        return out.gather(0, classes[None]).sum() / classes.numel()

    block = inferencer.model.backbone.get_submodule(name)
    expected = by_autograd(inferencer.model, block, score, 0, (6, 8))
    np.testing.assert_allclose(grad_cam(inferencer, photo, name), expected, atol=2e-3)
    assert attention_map(inferencer, photo) is None  # windows


@pytest.mark.filterwarnings('ignore')
def test_grad_cam_of_detections(root, tmp_path):
    trained(root, SCENES['instance'], tmp_path / 'a.safetensors')
    inferencer = AdapterInferencer(root / SCENES['instance'], tmp_path / 'a.safetensors', device='cpu')
    photo = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    cam = grad_cam(inferencer, photo, 'stages.2.blocks.1')
    assert cam.ndim == 2 and cam.max() == 1 and cam.std() > 0
    inferencer.model.roi_head.test_cfg.score_thr = 2.0
    assert grad_cam(inferencer, photo) is None  # nothing is found, so there is nothing to explain


def test_attention_of_the_class_token_by_formula(root, tmp_path):
    trained(root, DIGITS, tmp_path / 'a.safetensors')
    inferencer = AdapterInferencer(root / DIGITS, tmp_path / 'a.safetensors', device='cpu')
    layer, seen = inferencer.model.backbone.layers[3], []
    handle = layer.attn.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    inferencer([digit()])
    handle.remove()
    q, k, _ = layer.attn.qkv(seen[0][0]).view(50, 3, 3, 32).permute(1, 2, 0, 3)  # of three heads
    weights = torch.stack([torch.softmax(q[h] @ k[h].T / 32**0.5, dim=1) for h in range(3)]).mean(dim=0)
    expected = weights[0, 1:].view(7, 7).detach().numpy()
    np.testing.assert_allclose(attention_map(inferencer, digit()), expected / expected.max(), rtol=1e-3, atol=1e-5)


GLOBAL = ['ViT', 'ViT no class token', 'DeiT III', 'BEiT', 'EVA-02', 'timm ViT', 'mmseg ViT', 'mmseg BEiT', 'mmseg MAE']


@pytest.mark.parametrize('family', [f for f in FAMILIES if f.name in GLOBAL], ids=str)
def test_attention_is_seen_in_all_families(family):
    """A weight for each patch, whatever computes them; and the model is left as it was."""
    runs = Bare(family.build())
    x = image(family.sizes[0], batch=1)
    before = flatten(runs([x]))
    found = attention_map(runs, x)
    side = 64 // family.stride
    assert found.shape == (side, side) and found.min() > 0 and found.max() == 1
    assert all(torch.equal(a, b) for a, b in zip(before, flatten(runs([x]))))


def test_attention_of_torchs_own_module():
    """nn.MultiheadAttention gives the weights itself."""
    runs = Bare(next(f for f in FAMILIES if f.name == 'mmseg ViT no class token').build())
    x, seen = image((64, 64), batch=1), []
    attention = runs.model.layers[1].attn.attn
    handle = attention.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    runs([x])
    handle.remove()
    query = seen[0]['query'] if attention.batch_first else seen[0]['query'].transpose(0, 1)
    w, b = attention.in_proj_weight, attention.in_proj_bias
    q, k = (query[0] @ w[i : i + 32].T + b[i : i + 32] for i in (0, 32))
    heads = [torch.softmax(q[:, h : h + 16] @ k[:, h : h + 16].T / 4, dim=1) for h in (0, 16)]
    expected = torch.stack(heads).mean(dim=(0, 1)).view(4, 4).detach().numpy()
    np.testing.assert_allclose(attention_map(runs, x), expected / expected.max(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('name', ['mmdet PVT', 'Swin'])
def test_other_attention_is_left_out(name):
    runs = Bare(next(f for f in FAMILIES if f.name == name).build())
    block = {'mmdet PVT': 'layers.0.1.1', 'Swin': 'stages.0.blocks.0'}[name]
    assert attention_map(runs, image((64, 64), batch=1), block) is None


def test_blocks_by_name():
    backbone = next(f for f in FAMILIES if f.name == 'ViT').build()
    assert find_block(backbone).name == 'layers.1' and find_block(backbone, 'layers.0').block is backbone.layers[0]
    with pytest.raises(ValueError, match="no block 'layers.7' in the backbone; there are: layers.0, layers.1"):
        find_block(backbone, 'layers.7')
    with pytest.raises(ValueError, match='no known Transformer block in Linear'):
        find_block(torch.nn.Linear(2, 2))
