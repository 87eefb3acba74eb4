"""The tool, run by its main function."""

import json

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from families import stir
from mmengine.registry import MODELS, init_default_scope

from iconformer_mm import inject, save_adapter
from iconformer_mm.cli.visualize_icon import main
from iconformer_mm.engine import load_config

CONFIG = {
    'digits': 'configs/quickstart/vit-quickstart_icon_digits.py',
    'instance': 'configs/scenes/mask-rcnn_swin-scenes_fpn_icon_target.py',
    'semantic': 'configs/scenes/upernet_swin-scenes_icon_target.py',
    'depth': 'configs/scenes/depth_swin-scenes_icon_target.py',
}


def make_adapter(task, path, method='icon', seed=0):
    """A file with something like a trained adapter on the config's base."""
    cfg = load_config(str(ROOT / CONFIG[task]))
    init_default_scope(cfg.default_scope)
    torch.manual_seed(seed)
    model = MODELS.build(cfg.model)
    model.init_weights()
    inject(model, method, bottleneck=8)
    save_adapter(stir(model, seed=1 + seed), path)
    return path


def make_images(folder, number=3, size=(40, 56)):
    folder.mkdir()
    for index in range(number):
        image = np.random.default_rng(index).integers(0, 60 + 90 * index, (*size, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f'{index}.png'), image)
    return folder


@pytest.fixture
def visualize():
    """Run the tool; its status or its message."""

    def run(task, *arguments):
        options = ['--config', ROOT / CONFIG[task], '--device', 'cpu']
        with pytest.raises(SystemExit) as exit_info:
            main([*map(str, [*arguments, *options])])
        return exit_info.value.code

    return run


def pictures(folder):
    """Names of the pictures, none of which is blank."""
    found = {str(p.relative_to(folder)): cv2.imread(str(p)) for p in folder.rglob('*.png')}
    for name, picture in found.items():
        assert picture.std() > 5 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 20, name
    return set(found)


def test_classification_beside_another_method(visualize, tmp_path, capsys):
    icon = make_adapter('digits', tmp_path / 'icon.safetensors')
    other = make_adapter('digits', tmp_path / 'other.safetensors', 'adaptformer', seed=1)
    images = make_images(tmp_path / 'images')
    (images / 'broken.png').write_bytes(b'no image')
    out = tmp_path / 'out'
    assert visualize('digits', images, '--adapter', icon, '--compare', other, '--out', out, '--show', 2) == 1
    layers = [f'layers.{i}.adapter_attention' for i in range(4)]
    expected = {'distances.png', 'components.png', 'shares.png', 'saliency.png', 'features/0.png', 'features/2.png'}
    assert pictures(out) == expected | {f'kernels/{name}.png' for name in layers}
    content = json.loads((out / 'kernels.json').read_text())
    assert content['method'] == 'icon' and content['static'] is False and content['block'] == 'layers.3'
    assert content['images'] == [str(images / f'{i}.png') for i in range(3)]
    assert content['skipped'] == [str(images / 'broken.png')]
    assert list(content['layers']) == layers and sum(content['explained_variance']) == pytest.approx(1)  # of 3 images
    for layer in content['layers'].values():
        assert layer['channels'] == 8 and layer['kernel_size'] == 3
        assert 0 < layer['share_between_images'] < 1 and layer['mean_distance'] > 0 and layer['mean_norm'] > 0
    saliency = cv2.imread(str(out / 'saliency.png'))
    assert saliency.shape[1] > 1.5 * saliency.shape[0]  # the image, and two maps of two models
    assert 'broken.png is no image' in capsys.readouterr().err


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('task', ['instance', 'semantic', 'depth'])
def test_dense_tasks(task, visualize, tmp_path, capsys):
    icon = make_adapter(task, tmp_path / 'icon.safetensors')
    images = make_images(tmp_path / 'images', 2, (96, 128))
    out = tmp_path / 'out'
    assert visualize(task, images / '*.png', '--adapter', icon, '--out', out, '--block', 'stages.2.blocks.1') == 0
    assert len(pictures(out)) == 4 + 7 + 2
    message = ' '.join(capsys.readouterr().err.split())
    assert (
        f'no picture of attention in stages.2.blocks.1 ({"mmdet" if task == "instance" else "mmseg"} Swin)' in message
    )


def test_static_kernels_and_a_single_image(visualize, tmp_path, capsys):
    static = make_adapter('digits', tmp_path / 'static.safetensors', 'icon-static')
    images = make_images(tmp_path / 'images')
    assert visualize('digits', images, '--adapter', static, '--out', tmp_path / 'static') == 0
    assert 'the kernels are static: learned, and the same for all images' in capsys.readouterr().err
    content = json.loads((tmp_path / 'static' / 'kernels.json').read_text())
    assert content['static'] is True and len(pictures(tmp_path / 'static')) == 4 + 4 + 3
    assert all(layer['share_between_images'] == 0 for layer in content['layers'].values())
    assert visualize('digits', images / '0.png', '--adapter', static, '--out', tmp_path / 'one') == 0
    assert 'one image: there is nothing to compare its kernels with' in capsys.readouterr().err
    assert len(pictures(tmp_path / 'one')) == 4 + 1 + 1
    content = json.loads((tmp_path / 'one' / 'kernels.json').read_text())
    assert all(layer['share_between_images'] is None for layer in content['layers'].values())


def test_mistakes(visualize, tmp_path):
    images = make_images(tmp_path / 'images', 1)
    other = make_adapter('digits', tmp_path / 'other.safetensors', 'adaptformer')
    icon = make_adapter('digits', tmp_path / 'icon.safetensors')
    out = tmp_path / 'out'
    message = visualize('digits', images, '--adapter', other, '--out', out)
    assert message.startswith("error: the model has no iCoN adapters (it is adapted by 'adaptformer')")
    assert "there is no block 'layers.9'" in visualize(
        'digits', images, '--adapter', icon, '--out', out, '--block', 'layers.9'
    )
    assert 'none.safetensors does not exist' in visualize(
        'digits', images, '--adapter', tmp_path / 'none.safetensors', '--out', out
    )
    (images / '0.png').write_bytes(b'no image')
    assert visualize('digits', images, '--adapter', icon, '--out', out) == 'error: none of the images can be read'
    assert visualize('digits', images, '--adapter', icon, '--out', out, '--show', 0) == 2
