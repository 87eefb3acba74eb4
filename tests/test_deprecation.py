"""Names of the API that have moved still work, and say once where they are now."""

import re
from importlib import import_module

import pytest
from conftest import ROOT

from iconformer_mm import registry

MOVED = {
    'apis': {
        'inference': 'AdapterInferencer',
        'engine': 'add_peft build_runner leave_process_group load_config',
        'cli.parser': 'add_base guard load_by_command_line make_parser',
    },
    'apis.inspection': {
        'analysis.inspection': 'Cost Inspection cost_of find_mistakes inspect_model unseen_data',
        'engine.config': 'build_model method_of names_weights',
    },
    'apis.kernel_probe': {'analysis.kernel_probe': 'icon_adapters look_at_adapters share_between_images'},
    'apis.saliency': {'analysis.saliency': 'attention_map find_block grad_cam'},
    'visualization': {
        'comparison.plots': 'CurvePanel TradeoffPanel plot_comparison plot_curves plot_tradeoff',
        'comparison.prediction_plots': 'PredictionRow plot_predictions',
        'inference.drawing': 'draw_classes draw_instances',
    },
    'visualization.kernels': {'analysis.kernel_plots': 'plot_kernels plot_saliency'},
}
NAMES = [
    (f'iconformer_mm.{old}', f'iconformer_mm.{new}', name)
    for old, places in MOVED.items()
    for new, names in places.items()
    for name in names.split()
]


@pytest.mark.parametrize(('old', 'new', 'name'), NAMES)
def test_an_old_name_is_the_new_thing_and_warns_once(old, new, name, recwarn):
    module = import_module(old)
    vars(module).pop(name, None)  # as in a new process
    found = getattr(module, name)
    assert found is getattr(import_module(new), name)
    ours = [w for w in recwarn if w.category is DeprecationWarning and 'iconformer_mm' in str(w.message)]
    assert [str(w.message).partition(';')[0] for w in ours] == [f'{old}.{name} has moved to {new}.{name}']
    assert ours[0].filename == __file__
    getattr(module, name)
    assert len([w for w in recwarn if 'iconformer_mm' in str(w.message)]) == 1


@pytest.mark.parametrize('module', ['apis', 'apis.inspection', 'visualization'])
def test_a_name_that_never_was(module):
    with pytest.raises(AttributeError, match=f"module 'iconformer_mm.{module}' has no attribute 'nothing'"):
        import_module(f'iconformer_mm.{module}').nothing  # noqa: B018


def test_adapters_need_not_be_registered(monkeypatch, recwarn):
    monkeypatch.delitem(vars(registry), 'ADAPTERS', raising=False)
    for _ in range(2):
        exec('from iconformer_mm.registry import ADAPTERS\n@ADAPTERS.register_module()\nclass Own: pass\n', scope := {})
        scope['ADAPTERS'].module_dict.clear()
    assert [str(w.message).partition(' and')[0] for w in recwarn if 'iconformer_mm' in str(w.message)] == [
        'iconformer_mm.registry.ADAPTERS is deprecated'
    ]


def test_an_import_statement_warns_where_it_stands(recwarn):
    code = 'from iconformer_mm.apis import load_config, inspection\nfrom iconformer_mm.apis.inspection import method_of'
    for module, name in (('apis', 'load_config'), ('apis.inspection', 'method_of')):
        vars(import_module(f'iconformer_mm.{module}')).pop(name, None)
    exec(compile(code, 'program.py', 'exec'), {})
    places = [(w.filename, w.lineno, str(w.message)) for w in recwarn if 'iconformer_mm' in str(w.message)]
    assert [place[:2] for place in places] == [('program.py', 1), ('program.py', 2)]
    assert 'iconformer_mm.engine.load_config' in places[0][2] and 'engine.config.method_of' in places[1][2]


def test_nothing_of_ours_uses_an_old_name():
    for folder in ('iconformer_mm', 'tools', 'benchmarks', 'examples', 'configs'):
        for path in (ROOT / folder).rglob('*.py'):
            if path.parent.name not in ('apis', 'visualization'):
                text = path.read_text(encoding='utf-8')
                assert not re.search(r'iconformer_mm\.(apis|visualization)\b', text), path
