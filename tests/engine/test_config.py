"""What a config says of its PEFTHooks."""

import contextlib
import sys
from types import SimpleNamespace

import pytest
from mmengine.config import Config

from iconformer_mm import extras
from iconformer_mm.engine import PEFTHook, add_peft, config, load_config
from iconformer_mm.engine.config import build_model, check_text_encoder, method_of, peft_hooks
from iconformer_mm.engine.launch import build_runner
from iconformer_mm.extras import MissingExtraError


class OwnHook(PEFTHook):
    pass


def test_hooks_are_found_wherever_they_stand_and_however_they_are_named():
    built = PEFTHook('lora')
    custom = [dict(type='EMAHook'), dict(type='PEFTHook', method='icon'), built, dict(type=OwnHook), None]
    default = dict(peft=dict(type='iconformer_mm.PEFTHook'), checkpoint=None, logger=dict(type='LoggerHook'))
    cfg = Config(dict(custom_hooks=custom, default_hooks=default))
    found = peft_hooks(cfg)
    assert found[:2] == [dict(type='PEFTHook', method='icon'), built]
    assert [hook['type'] for hook in found[2:]] == [OwnHook, 'iconformer_mm.PEFTHook']
    assert peft_hooks(Config(dict(custom_hooks=None))) == [] and method_of(Config(dict())) is None


def test_one_that_is_added_takes_the_place_of_all_others():
    cfg = Config(dict(custom_hooks=[dict(type=OwnHook), dict(type='EMAHook'), PEFTHook('lora')]))
    add_peft(cfg, dict(type='icon', bottleneck=4))
    assert cfg.custom_hooks == [dict(type='EMAHook')]
    assert method_of(cfg) == dict(method=dict(type='icon', bottleneck=4))


@pytest.mark.parametrize(
    ('written', 'meant'),
    [
        ('optim_wraper', 'optim_wrapper'),
        ('custom_hook', 'custom_hooks'),
        ('trian_dataloader', 'train_dataloader'),
        ('load_form', 'load_from'),
        ('modle', 'model'),
    ],
)
def test_a_misspelt_setting_of_a_config_is_an_error(written, meant, tmp_path):
    """Nobody would read it, and training would go by the default."""
    (tmp_path / 'c.py').write_text(f'{written} = None\n')
    with pytest.raises(ValueError, match=rf"nobody reads the setting '{written}' \(did you mean '{meant}'\?\)"):
        load_config(str(tmp_path / 'c.py'))


def test_variables_of_a_config_are_no_misspelt_settings(tmp_path):
    """Names that configs of the libraries use, and numbered variants."""
    names = ('models', 'conv_cfg', 'train_pipeline_1e', 'oi_train_pipeline', 'val_evaluator_full', 'train_pipeline2')
    (tmp_path / 'c.py').write_text(''.join(f'{name} = None\n' for name in names))
    assert set(names) <= set(load_config(str(tmp_path / 'c.py')))


@pytest.mark.parametrize('build', [build_model, build_runner])
def test_a_model_that_reads_text_without_transformers(build, monkeypatch):
    monkeypatch.setattr(extras, 'find_spec', lambda name: None)
    cfg = Config(dict(default_scope='mmdet', model=dict(type='mmdet.GroundingDINO')))
    with pytest.raises(MissingExtraError, match=r"the text encoder of GroundingDINO needs transformers.*mm\[text\]'"):
        build(cfg)


class Attention:
    def forward(self, hidden_states):
        pass


class LaterAttention:
    def forward(self, hidden_states, cache_position=None):
        pass


@pytest.mark.parametrize(
    ('release', 'attention', 'refused'),
    [
        ('4.49.0', Attention, []),
        ('4.55.4', LaterAttention, ['GLIP']),
        ('4.57.6', object, ['GLIP']),
        ('5.24.0', object, ['GLIP', 'GroundingDINO']),
    ],
)
def test_a_model_that_reads_text_with_a_release_that_mmdetection_cannot_use(release, attention, refused, monkeypatch):
    """4.55 gives attention one more argument, 4.56 has moved what MMDetection imports, and 5 lacks a method."""
    from mmdet.models.utils import vlfuse_helper

    methods = {} if release.startswith('5') else dict(batch_encode_plus=None)
    library = SimpleNamespace(PreTrainedTokenizerBase=type('PreTrainedTokenizerBase', (), methods))
    monkeypatch.setitem(sys.modules, 'transformers', library)
    monkeypatch.setattr(vlfuse_helper, 'HFBertAttention', attention)
    monkeypatch.setattr(extras, 'find_spec', lambda name: name)
    monkeypatch.setattr(config, 'version', lambda name: release)
    for kind in ('GLIP', 'GroundingDINO'):
        expected = pytest.raises(ValueError, match=f"cannot run {kind} with transformers {release}.*'.*,<4.50'")
        with expected if kind in refused else contextlib.nullcontext():
            check_text_encoder(dict(type=kind))
