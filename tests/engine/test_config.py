"""What a config says of its PEFTHooks."""

from mmengine.config import Config

from iconformer_mm.engine import PEFTHook, add_peft
from iconformer_mm.engine.config import method_of, peft_hooks


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
