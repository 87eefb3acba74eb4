"""What a run trains, tests or goes on from is what the files hold, or an error before time is spent."""

import uuid

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from tiny_runs import config

from iconformer_mm import load_adapter
from iconformer_mm.checkpoint import AdapterFileError, load_safetensors, read_adapter, write_adapter
from iconformer_mm.engine import build_runner
from iconformer_mm.tuning import get_injection
from iconformer_mm.tuning.accounting import NO_WEIGHTS, WeightsError

SMALL = dict(type='AdapterCheckpointHook', interval=1)
SWIN = dict(
    type='SwinTransformer',
    arch=dict(embed_dims=8, depths=[1, 1], num_heads=[1, 2]),
    img_size=32,
    in_channels=1,
    window_size=4,
    out_indices=(1,),
    drop_path_rate=0.0,
)


def make(work_dir, method='icon', stock=False, **changes):
    """A runner; ``method`` None is one that is not adapted."""
    if isinstance(method, str):
        method = dict(type=method, bottleneck=8) if method == 'icon' else dict(type=method)
    hooks = [] if method is None else [dict(type='PEFTHook', method=method)]
    classes = changes.get('model.head.num_classes')
    if classes is not None:  # data of as many classes as the head has
        changes |= {f'{split}_dataloader.dataset.num_classes': classes for split in ('train', 'val', 'test')}
    cfg = config(work_dir, **{'custom_hooks': hooks + changes.pop('hooks', []), **changes})
    cfg.experiment_name = uuid.uuid4().hex
    return Runner.from_cfg(cfg) if stock else build_runner(cfg)


def strip(path, out):
    """The checkpoint as releases wrote it that kept no record."""
    checkpoint = torch.load(path, weights_only=False)
    del checkpoint['meta']['iconformer_mm']
    torch.save(checkpoint, out)
    return str(out)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A base, and what runs on it left: checkpoints of both kinds, with and without a record, and adapter files."""
    folder = tmp_path_factory.mktemp('files')
    base = make(folder / 'base', None)
    base.train()
    weights = {n: v for n, v in base.model.state_dict().items() if n.startswith('backbone.')}
    torch.save(dict(state_dict=weights), folder / 'base.pth')
    load = dict(load_from=str(folder / 'base.pth'))
    make(folder / 'whole', **load).train()
    make(folder / 'small', **load, **{'default_hooks.checkpoint': SMALL}).train()
    make(folder / 'other', 'lora', **load).train()
    strip(folder / 'whole' / 'epoch_2.pth', folder / 'old.pth')
    return folder


def given(files):
    return dict(load_from=str(files / 'base.pth'))


OTHERS = {
    'options': (dict(type='icon', bottleneck=4), r"'icon' with bottleneck=8 there, 4 here"),
    'scale': (dict(type='icon', bottleneck=8, kernel_size=5), r"'icon' with kernel_size=3 there, 5 here"),
    'method': ('lora', "'icon' there, 'lora' here"),
}


@pytest.mark.parametrize('resume', [False, True], ids=['test', 'resume'])
@pytest.mark.parametrize('kind', ['whole', 'small'])
@pytest.mark.parametrize('other', OTHERS)
def test_another_method_is_one_sentence(other, kind, resume, files, tmp_path):
    method, difference = OTHERS[other]
    hook = {'default_hooks.checkpoint': SMALL} if kind == 'small' else {}
    path = files / kind / f'epoch_1.{"safetensors" if kind == "small" else "pth"}'
    runner = make(tmp_path, method, load_from=str(path), resume=resume, **hook)
    with pytest.raises(
        WeightsError, match=f'epoch_1.* was trained with another PEFT method: {difference}. Use the method and'
    ):
        runner.train() if resume else runner.test()


@pytest.mark.parametrize(
    ('method', 'message'),
    [
        (dict(type='icon', bottleneck=4), r'or with other options than .*: backbone.layers.0.adapter.*here'),
        ('lora', r'or with other options than .*adapter.* missing (there|here)|missing'),
        (None, 'was trained with adapters, such as backbone.layers.0.*but the model is not adapted. Name the method'),
    ],
)
def test_another_method_is_known_without_a_record(method, message, files, tmp_path):
    with pytest.raises(WeightsError, match=message):
        make(tmp_path, method, load_from=str(files / 'old.pth')).test()


def test_a_checkpoint_without_a_record_is_tested_and_resumed(files, tmp_path):
    expected = make(tmp_path / 'a', load_from=str(files / 'whole' / 'epoch_2.pth')).test()
    assert make(tmp_path / 'b', load_from=str(files / 'old.pth')).test() == expected
    runner = make(tmp_path / 'c', load_from=strip(files / 'whole' / 'epoch_1.pth', tmp_path / '1.pth'), resume=True)
    runner.train()
    final = torch.load(files / 'whole' / 'epoch_2.pth', weights_only=False)['state_dict']
    assert all(torch.equal(value, final[name]) for name, value in runner.model.state_dict().items())


@pytest.mark.parametrize('path', ['whole/epoch_2.pth', 'small/epoch_2.safetensors', 'whole/adapter.safetensors'])
@pytest.mark.parametrize('mode', ['test', 'train', 'resume'])
def test_adapters_without_a_method_are_refused(path, mode, files, tmp_path):
    runner = make(tmp_path, None, load_from=str(files / path), resume=mode == 'resume')
    with pytest.raises(WeightsError, match='not adapted. Name the method with --peft, or with a PEFTHook'):
        runner.test() if mode == 'test' else runner.train()


def test_a_plain_checkpoint_is_a_base_but_cannot_be_tested_with_a_method(files, tmp_path):
    path = str(files / 'base' / 'epoch_2.pth')
    for resume in (False, True):
        with pytest.raises(
            WeightsError, match="holds no adapters, but the model is adapted by 'icon'. Leave the method"
        ):
            runner = make(tmp_path / str(resume), load_from=path, resume=resume)
            runner.train() if resume else runner.test()
    make(tmp_path / 'train', load_from=path).train()


@pytest.mark.parametrize('method', [None, 'icon', 'frozen', 'full'])
@pytest.mark.parametrize('validate', [False, True])
def test_a_head_that_was_not_loaded_is_not_tested(method, validate, files, tmp_path):
    path = files / ('whole' if method == 'icon' else 'base') / 'epoch_2.pth'
    state = torch.load(path, weights_only=False)
    changes = {'model.head.num_classes': 7} if validate else {}
    if not validate:
        del state['state_dict']['head.fc.weight'], state['state_dict']['head.fc.bias']
    torch.save(state, tmp_path / 'w.pth')
    runner = make(tmp_path, method, load_from=str(tmp_path / 'w.pth'), **changes)
    what = r' \(\(4, 32\) in the file, \(7, 32\) in the model\)' if validate else ', head.fc.bias'
    with pytest.raises(WeightsError, match=f'w.pth lacks 2 of the .* such as head.fc.weight{what}'):
        runner.val() if validate else runner.test()


def test_a_model_without_any_weights(files, tmp_path, caplog):
    with pytest.raises(WeightsError, match='there are no weights: the model would be tested with its initial values'):
        make(tmp_path / 'test').test()
    make(tmp_path / 'train').train()
    log = next((tmp_path / 'train').glob('*/*.log')).read_text()
    assert log.count(NO_WEIGHTS) == 1
    make(tmp_path / 'given', **given(files)).train()
    assert NO_WEIGHTS not in next((tmp_path / 'given').glob('*/*.log')).read_text()


@pytest.mark.parametrize(
    ('keep', 'message'),
    [
        ('head', 'but 30 frozen tensors of the backbone were in none of the files, such as backbone.cls_token'),
        ('backbone.layers', '4 of 30 frozen tensors are missing, among them cls_token'),
        ('backbone.adapter', 'holds no|lacks|weights were loaded|no weights'),
    ],
)
def test_weights_that_leave_frozen_tensors_random_are_an_error(keep, message, files, tmp_path):
    state = torch.load(files / 'base' / 'epoch_2.pth', weights_only=False)['state_dict']
    torch.save(dict(state_dict={n: v for n, v in state.items() if n.startswith(keep)}), tmp_path / 'w.pth')
    if keep == 'backbone.adapter':
        path = str(files / 'small' / 'epoch_2.safetensors')  # what was trained, and no base
        with pytest.raises(WeightsError, match='holds only the trained tensors, not the base.*AdapterCheckpointHook'):
            make(tmp_path, load_from=path).train()
        return
    with pytest.raises(WeightsError, match=message):
        make(tmp_path, load_from=str(tmp_path / 'w.pth')).train()


def test_training_goes_on_from_an_adapter_file(files, tmp_path):
    """With the base by init_cfg, and as load_adapter would fill the model."""
    source = files / 'whole' / 'adapter.safetensors'
    init = {'model.backbone.init_cfg': dict(type='Pretrained', checkpoint=str(files / 'base.pth'), prefix='backbone.')}
    runner = make(tmp_path / 'a', load_from=str(source), hooks=[dict(type='KeepHook')], **init)
    runner.train()
    model = make(tmp_path / 'b', None, **given(files))
    model.load_or_resume()
    load_adapter(model.model, source)
    kept = next(h for h in runner.hooks if type(h).__name__ == 'KeepHook').kept
    assert all(torch.equal(value, model.model.state_dict()[name]) for name, value in kept.items())
    expected = make(tmp_path / 'c', load_from=str(files / 'whole' / 'epoch_2.pth')).test()
    assert make(tmp_path / 'd', load_from=str(source), **init).test() == expected


@HOOKS.register_module()
class KeepHook(Hook):
    """Keeps the model as it is when training begins."""

    def before_train(self, runner):
        self.kept = {name: value.clone() for name, value in runner.model.state_dict().items()}


@pytest.mark.parametrize('case', ['no base', 'another base', 'another method', 'another head', 'resume'])
def test_an_adapter_file_that_does_not_fit(case, files, tmp_path):
    init = dict(type='Pretrained', checkpoint=str(files / 'base.pth'), prefix='backbone.')
    changes = {'load_from': str(files / 'whole' / 'adapter.safetensors'), 'model.backbone.init_cfg': init}
    method, error, message = 'icon', AdapterFileError, 'it was trained on another base: the base weights have finger'
    if case == 'no base':
        changes['model.backbone.init_cfg'] = None
    elif case == 'another base':
        state = torch.load(files / 'base.pth')
        state['state_dict']['backbone.cls_token'] += 1
        torch.save(state, tmp_path / 'b.pth')
        changes['model.backbone.init_cfg'] = dict(init, checkpoint=str(tmp_path / 'b.pth'))
    elif case == 'another method':
        method, error, message = 'lora', WeightsError, "another PEFT method: 'icon' there, 'lora' here"
    elif case == 'another head':
        changes['model.head.num_classes'] = 5
        message = '2 tensors are of another shape or kind, such as head.fc.bias'
    else:
        changes['resume'] = True
        error, message = WeightsError, 'is an adapter file: it has no optimizer.* as `load_from` without resuming'
    with pytest.raises(error, match=message):
        make(tmp_path, method, **changes).train()


def test_a_file_of_the_backbone_alone_trains_a_new_head_and_is_not_tested(files, tmp_path):
    content, tensors = read_adapter(files / 'whole' / 'adapter.safetensors')
    write_adapter(tmp_path / 'b.safetensors', content, {n: v for n, v in tensors.items() if n.startswith('backbone.')})
    init = {'model.backbone.init_cfg': dict(type='Pretrained', checkpoint=str(files / 'base.pth'), prefix='backbone.')}
    load = dict(load_from=str(tmp_path / 'b.safetensors'), **init)
    make(tmp_path / 'train', **load, **{'model.head.num_classes': 6}).train()
    with pytest.raises(WeightsError, match='b.safetensors lacks 2 of the .* such as head.fc.weight'):
        make(tmp_path / 'test', **load).test()


def test_averages_obey_the_same_rule(files, tmp_path):
    ema = [dict(type='EMAHook', momentum=0.5)]
    make(tmp_path / 'run', hooks=ema, **given(files)).train()
    path = tmp_path / 'run' / 'epoch_1.pth'
    make(tmp_path / 'on', hooks=ema, load_from=str(path), resume=True).train()
    make(tmp_path / 'test', load_from=str(path)).test()  # the averages, which validation measured
    with pytest.raises(WeightsError, match='its weights are averages. Resume with the same EMAHook'):
        make(tmp_path / 'raw', load_from=str(path), resume=True).train()
    for name, change in {
        'module.head.fc.weight': lambda slot, name: slot.pop(name),
        'module.backbone.layers.0.adapter_attention.up.weight': lambda slot, name: slot.update({name: slot[name][:-1]}),
    }.items():
        state = torch.load(path, weights_only=False)
        change(state['ema_state_dict'], name)
        torch.save(state, tmp_path / 'broken.pth')
        with pytest.raises(WeightsError, match=f'ema_state_dict.* differ in 1 names or shapes, such as {name}'):
            make(tmp_path / 'broken', hooks=ema, load_from=str(tmp_path / 'broken.pth'), resume=True).train()


def test_stock_runners_are_watched_by_the_peft_hook(files, tmp_path):
    path = str(files / 'whole' / 'epoch_2.pth')
    with pytest.raises(WeightsError, match='lacks 2 of the'):
        make(tmp_path / 'a', stock=True, load_from=path, **{'model.head.num_classes': 7}).test()
    with pytest.raises(WeightsError, match='another PEFT method'):
        make(tmp_path / 'b', 'lora', stock=True, load_from=path).test()


@pytest.mark.parametrize('kind', ['CheckpointHook', 'AdapterCheckpointHook'])
def test_output_norms_that_the_weights_lack_are_trained_kept_and_resumed(kind, tmp_path):
    """A classifier's weights for a backbone that has a norm more."""
    torch.manual_seed(0)
    body = {
        'model.backbone': dict(SWIN, _delete_=True),
        'model.head.in_channels': 16,
        'model.neck': dict(type='GlobalAveragePooling'),
    }
    base = make(tmp_path / 'base', None, **body)
    base.model.init_weights()
    state = {n: v for n, v in base.model.backbone.state_dict().items() if not n.startswith('norm1.')}
    torch.save(dict(state_dict=state), tmp_path / 'base.pth')
    init = dict(type='Pretrained', checkpoint=str(tmp_path / 'base.pth'))
    body['model.backbone'] = dict(SWIN, _delete_=True, init_cfg=init)
    body['default_hooks.checkpoint'] = dict(type=kind, interval=1)
    end = 'pth' if kind == 'CheckpointHook' else 'safetensors'

    whole = make(tmp_path / 'whole', **body)
    whole.train()
    norm = whole.model.backbone.norm1
    optimized = {id(p) for group in whole.optim_wrapper.param_groups for p in group['params']}
    assert {id(norm.weight), id(norm.bias)} <= optimized and not torch.equal(norm.weight, torch.ones(16))
    assert optimized == {id(p) for p in whole.model.parameters() if p.requires_grad}

    resumed = make(tmp_path / 'resumed', resume=True, load_from=str(tmp_path / 'whole' / f'epoch_1.{end}'), **body)
    resumed.train()
    final = whole.model.state_dict()
    assert all(torch.equal(value, final[name]) for name, value in resumed.model.state_dict().items())

    score = whole.test()
    assert make(tmp_path / 'test', load_from=str(tmp_path / 'whole' / f'epoch_2.{end}'), **body).test() == score
    file = tmp_path / 'whole' / 'adapter.safetensors'
    assert torch.equal(read_adapter(file)[1]['backbone.norm1.weight'], norm.weight)
    assert make(tmp_path / 'file', load_from=str(file), **body).test() == score
    again = make(tmp_path / 'again', load_from=str(file), hooks=[dict(type='KeepHook')], **body)
    again.train()
    kept = next(h for h in again.hooks if type(h).__name__ == 'KeepHook').kept
    assert all(torch.equal(value, final[name]) for name, value in kept.items())
    assert again.model.backbone.norm1.weight.requires_grad
    assert get_injection(again.model).accounts['backbone'].pinned


def test_loaders_of_mmengine_tell_adapter_files_from_state_dicts(files):
    checkpoint = load_safetensors(str(files / 'whole' / 'adapter.safetensors'))
    content, tensors = read_adapter(files / 'whole' / 'adapter.safetensors')
    assert checkpoint['adapter_file'] == content and checkpoint['state_dict'].keys() == tensors.keys()
