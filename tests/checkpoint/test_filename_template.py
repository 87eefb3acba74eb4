import pytest

from iconformer_mm.checkpoint.filename_template import FilenameTemplate

READABLE = [
    'epoch_{}',
    'epoch_{:03d}',
    '{0}',
    '{0:>8}',
    '{:x}',
    '{:#b}',
    '{:,}',
    '{:_}',
    '{:+d}',
    'e{0}_{0}',
    '{!r}',
] + ['sub/epoch_{}', 'epoch_{}/model', '{{x}}_{:04}', 'a.b*c[{}]']


@pytest.mark.parametrize('template', READABLE)
@pytest.mark.parametrize('step', [0, 3, 12, 999, 1000, 123456])
def test_a_number_that_is_put_in_is_read_back(template, step, tmp_path):
    names = FilenameTemplate(template)
    path = tmp_path / template.format(step)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    for other in ('last', 'epoch_x', 'best_acc_3', 'notes.txt'):
        (tmp_path / other).touch()
    assert names.find(tmp_path) == {path: step}


@pytest.mark.parametrize(
    ('template', 'message'),
    [
        ('{epoch}', 'cannot be filled in'),
        ('{1}', 'cannot be filled in'),
        ('{}_{}', 'cannot be filled in'),
        ('{', 'cannot be filled in'),
        ('{:z}', 'cannot be filled in'),
        ('{:c}', 'cannot be filled in|cannot|not be read back'),
        ('{:.2e}', 'cannot be read back|number cannot'),
        ('../{}', 'leaves the folder'),
        ('/tmp/{}', 'leaves the folder'),
    ],
)
def test_what_cannot_be_read_back_is_refused(template, message):
    with pytest.raises(ValueError, match=message):
        FilenameTemplate(template)
