"""Mistakes in a comparison show before its first run."""

from copy import deepcopy

import pytest
import yaml
from commands import tool
from conftest import ROOT

from iconformer_mm.comparison.results import result_files

CONFIGS = ROOT / 'configs' / 'quickstart'
COMPARISON = dict(
    title='Tiny',
    seeds=[0],
    search_seed=100,
    tasks=dict(
        digits=dict(
            config=str(CONFIGS / 'vit-quickstart_full_digits.py'),
            base=str(CONFIGS / 'vit-quickstart_strokes.safetensors'),
            metric='accuracy/top1',
            title='digits (%)',
            learning_rates=[3e-3, 1e-2],
        )
    ),
    methods=dict(frozen=dict(title='frozen', method=dict(type='frozen'))),
)


def compare(tmp_path, content):
    """The lines of a comparison that is refused. Nothing was run."""
    (tmp_path / 'c.yaml').write_text(yaml.safe_dump(content, sort_keys=False))
    output = tool('compare.py', tmp_path / 'c.yaml', '--out', tmp_path / 'out', '--jobs', 2, ok=False)
    assert not result_files(tmp_path / 'out')
    head, *lines = output[output.index('error in the comparison') :].splitlines()
    assert head == 'error in the comparison: the first step fails, so nothing was run'
    return {name: message for name, _, message in (line.partition(': ') for line in lines)}


def test_each_mistake_of_a_method_is_one_line(tmp_path):
    content = deepcopy(COMPARISON)
    broken = dict(
        name=(dict(type='icno'), {}, "unknown PEFT method 'icno' (did you mean 'icon'?)"),
        option=(dict(type='icon', botleneck=4), {}, "unknown option 'botleneck' of PEFT method 'icon'"),
        blocks=(dict(type='icon'), {'default_hooks.peft.blocks': 'last:9'}, "blocks: there is no 'last:9'"),
        hook=(dict(type='icon'), {'default_hooks.peft.blocsk': 'last:1'}, "unknown option 'blocsk' of PEFTHook"),
        cache=(
            dict(type='icon'),
            {'default_hooks.peft.prefix_cache': dict(vews=2)},
            "prefix_cache has no option 'vews'",
        ),
        ignored=(dict(type='icon'), {'train_dataloder.batch_size': 2}, "there is no setting 'train_dataloder'"),
        rate=(dict(type='icon'), {'optim_wrapper.optimizer.weight_decy': 0}, "'weight_decy'"),
    )
    for name, (method, options, _) in broken.items():
        content['methods'][name] = dict(title=name, method=method, options=options)
    found = compare(tmp_path, content)
    assert found.keys() == {f'digits/{name}' for name in broken}  # the method without a mistake has none
    for name, (*_, message) in broken.items():
        assert message in found[f'digits/{name}']
        assert f'out/runs/digits/{name}/' in found[f'digits/{name}'] and 'output.log)' in found[f'digits/{name}']


@pytest.mark.parametrize(
    ('task', 'message'),
    [
        (dict(metric='accuracy/top'), "gives no metric 'accuracy/top' (did you mean 'accuracy/top1'?)"),
        (dict(options={'model.head.num_classes': 7}), 'head is for 7 classes, but Digits'),
        (dict(options={'train_dataloader.dataset.splt': 'train'}), "unknown option 'splt' of Digits"),
        (dict(search_options={'val_dataloader.dataset.split': 'valid'}), "'valid'"),
    ],
)
def test_a_mistake_of_a_task_is_one_line_for_all_methods(task, message, tmp_path):
    content = deepcopy(COMPARISON)
    content['methods']['bitfit'] = dict(title='BitFit', method=dict(type='bitfit'))
    content['tasks']['digits'] |= task
    found = compare(tmp_path, content)
    assert list(found) == ['digits/bitfit, digits/frozen'] and message in found['digits/bitfit, digits/frozen']
