"""The command that predicts and draws."""

import json

import cv2
import numpy as np
import pytest
from trained_adapters import DIGITS, SCENES, trained

from iconformer_mm.cli.predict import main
from iconformer_mm.inference import AdapterInferencer


@pytest.fixture
def photo():
    return np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)


def predict(*arguments):
    """Run the command; what it exits with."""
    with pytest.raises(SystemExit) as exit_info:
        main([*map(str, arguments)])
    return exit_info.value.code


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('task', ['digits', *SCENES])
def test_the_tool_draws_and_names_what_it_cannot_read(task, root, photo, tmp_path, monkeypatch, capsys):
    config = DIGITS if task == 'digits' else SCENES[task]
    trained(root, config, tmp_path / 'a.safetensors')
    folder = tmp_path / 'images'
    (folder / 'more').mkdir(parents=True)
    for name in ('one.png', 'two.png', 'more/one.png'):
        cv2.imwrite(str(folder / name), photo)
    (folder / 'broken.jpg').write_bytes(b'no image')
    (folder / 'notes.txt').write_text('not looked at')
    arguments = [folder, folder / 't*.png', '--config', root / config, '--adapter', tmp_path / 'a.safetensors']
    assert predict(*arguments, '--out', tmp_path / 'out', '--device', 'cpu') == 1
    assert 'broken.jpg is no image' in ' '.join(capsys.readouterr().err.split())
    content = json.loads((tmp_path / 'out' / 'predictions.json').read_text())
    assert content['skipped'] == [str(folder / 'broken.jpg')]
    assert set(content['predictions']) == {str(folder / n) for n in ('one.png', 'two.png', 'more/one.png')}
    pictures = {str(p.relative_to(tmp_path / 'out')) for p in (tmp_path / 'out').rglob('*.png.png')}
    assert pictures == {'one.png.png', 'two.png.png', 'more/one.png.png'}
    for picture in pictures:
        assert cv2.imread(str(tmp_path / 'out' / picture)).std() > 0
    if task == 'depth':
        assert np.load(tmp_path / 'out' / 'two.png_depth.npy').shape == photo.shape[:2]


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('task', ['digits', 'depth'])
def test_the_tool_leaves_out_what_the_model_cannot_take(task, root, photo, tmp_path, monkeypatch, capsys):
    """The others are written; the status says that one is missing."""
    config = DIGITS if task == 'digits' else SCENES[task]
    trained(root, config, tmp_path / 'a.safetensors')
    (tmp_path / 'images').mkdir()
    for name in ('first', 'last'):
        cv2.imwrite(str(tmp_path / 'images' / f'{name}.png'), photo)
    name = 'mid[a].png'  # no markup of a terminal's
    cv2.imwrite(str(tmp_path / 'images' / name), photo[:1, :1])
    arguments = [tmp_path / 'images', '--config', root / config, '--adapter', tmp_path / 'a.safetensors']
    predict_one = AdapterInferencer.__call__

    def refuse_small(self, images, *args, **kwargs):
        if min(images[0].shape[:2]) < 2:
            raise RuntimeError('output size is\ntoo small')
        return predict_one(self, images, *args, **kwargs)

    monkeypatch.setattr(AdapterInferencer, '__call__', refuse_small)
    assert predict(*arguments, '--out', tmp_path / 'out', '--device', 'cpu') == 1
    err = ' '.join(capsys.readouterr().err.split())
    assert f'{name} (1 x 1) cannot be taken by the model (RuntimeError: output size is too small)' in err
    content = json.loads((tmp_path / 'out' / 'predictions.json').read_text())
    assert content['skipped'] == [str(tmp_path / 'images' / name)]
    assert set(content['predictions']) == {str(tmp_path / 'images' / f'{n}.png') for n in ('first', 'last')}
    assert {path.name for path in (tmp_path / 'out').glob('*.png')} == {'first.png', 'last.png'}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('task', ['digits', *SCENES])
def test_an_image_of_one_pixel_ends_no_run(task, root, photo, tmp_path, monkeypatch):
    config = DIGITS if task == 'digits' else SCENES[task]
    trained(root, config, tmp_path / 'a.safetensors')
    (tmp_path / 'images').mkdir()
    for name, image in (('a', photo[:1, :1]), ('b', photo), ('c', photo[:, :1]), ('d', photo)):
        cv2.imwrite(str(tmp_path / 'images' / f'{name}.png'), image)
    arguments = [tmp_path / 'images', '--config', root / config, '--adapter', tmp_path / 'a.safetensors']
    status = predict(*arguments, '--out', tmp_path / 'out', '--device', 'cpu')
    content = json.loads((tmp_path / 'out' / 'predictions.json').read_text())
    written = {path.stem for path in (tmp_path / 'out').glob('*.png') if not path.stem.endswith('_labels')}
    assert {str(tmp_path / 'images' / f'{name}.png') for name in written} == set(content['predictions'])
    assert {'b', 'd'} <= written and len(written) + len(content['skipped']) == 4
    assert status == (1 if content['skipped'] else 0)


@pytest.mark.filterwarnings('ignore')
def test_a_prediction_without_numbers_is_left_out(root, photo, tmp_path, monkeypatch, capsys):
    trained(root, DIGITS, tmp_path / 'a.safetensors')
    cv2.imwrite(str(tmp_path / 'a.png'), photo)
    predict_one = AdapterInferencer.__call__

    def spoil(self, images, *args, **kwargs):
        predictions = predict_one(self, images, *args, **kwargs)
        predictions[0].set_pred_score(predictions[0].pred_score * float('nan'))
        return predictions

    monkeypatch.setattr(AdapterInferencer, '__call__', spoil)
    arguments = [tmp_path / 'a.png', '--config', root / DIGITS, '--adapter', tmp_path / 'a.safetensors']
    assert predict(*arguments, '--out', tmp_path / 'out', '--device', 'cpu') == 1
    assert 'numbers that are not finite' in ' '.join(capsys.readouterr().err.split())
    assert json.loads((tmp_path / 'out' / 'predictions.json').read_text())['predictions'] == {}


def test_the_tool_refuses_what_is_not_there(root, tmp_path, monkeypatch):
    arguments = [tmp_path / 'none.png', '--config', root / DIGITS, '--out', tmp_path]
    assert 'no image, no folder' in predict(*arguments)
