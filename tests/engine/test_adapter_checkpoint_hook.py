import os

import pytest
import torch
from interrupted_runs import Interrupted, equal, make, state
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from safetensors.torch import load_file

from iconformer_mm.checkpoint import DamagedFileError, load_safetensors, read_adapter
from iconformer_mm.checkpoint.training_checkpoint import save_checkpoint
from iconformer_mm.cli.adapter import main as adapter_tool
from iconformer_mm.engine import AdapterCheckpointHook
from iconformer_mm.tuning import WeightsError

VARIANTS = {
    'epochs': {},
    'iterations': dict(loop='iter'),
    'workers': {'train_dataloader.num_workers': 1, 'train_dataloader.persistent_workers': False},
    'EMA': dict(custom_hooks=[dict(type='EMAHook', momentum=0.1)]),
    'accumulation': {'optim_wrapper.accumulative_counts': 3},
    'accumulation, iterations': {'optim_wrapper.accumulative_counts': 3, 'loop': 'iter'},
    'clipping': {'optim_wrapper.clip_grad': dict(max_norm=0.1)},
    'seed by lot': {'randomness': dict(seed=None)},
}


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.filterwarnings('ignore')
def test_a_resumed_run_ends_as_the_uninterrupted_one(variant, tmp_path):
    options = VARIANTS[variant]
    if variant == 'seed by lot':  # and yet the same for both runs
        drawn = {'randomness': dict(seed=7)}
        whole = make(tmp_path / 'whole', **drawn)
        whole.train()
        with pytest.raises(Interrupted):
            make(tmp_path / 'cut', interrupt=11, **drawn).train()
    else:
        whole = make(tmp_path / 'whole', **options)
        whole.train()
        with pytest.raises(Interrupted):
            make(tmp_path / 'cut', interrupt=11, **options).train()
    resumed = make(tmp_path / 'cut', resume=True, **options)
    resumed.train()
    assert equal(state(whole), state(resumed))
    names = {n.replace('cut', 'whole') for n in os.listdir(tmp_path / 'cut') if n.endswith('.safetensors')}
    assert names == {n for n in os.listdir(tmp_path / 'whole') if n.endswith('.safetensors')}
    (last,) = [n for n in names if n.startswith(('epoch_4', 'iter_16'))]
    first, second = (load_safetensors(str(tmp_path / run / last)) for run in ('whole', 'cut'))
    assert equal(first['state_dict'], second['state_dict'])
    if variant == 'EMA':
        assert equal(first['ema_state_dict'], second['ema_state_dict'])
        assert not equal(first['state_dict'], {k[7:]: v for k, v in first['ema_state_dict'].items()})


def test_a_checkpoint_holds_what_is_trained(tmp_path):
    runner = make(tmp_path)
    runner.train()
    checkpoint = load_safetensors(str(tmp_path / 'epoch_4.safetensors'))
    own = state(runner)
    trained = {n: v for n, v in own.items() if 'adapter' in n or not n.startswith('backbone.')}
    assert equal(checkpoint['state_dict'], trained) and len(trained) < len(own)
    assert len(checkpoint['optimizer']['state']) == sum(p.requires_grad for p in runner.model.parameters())
    assert checkpoint['meta']['epoch'] == 4 and checkpoint['meta']['iter'] == 16
    # By safetensors alone.
    tensors = load_file(tmp_path / 'epoch_4.safetensors')
    assert torch.equal(tensors['state_dict/head.fc.weight'], own['head.fc.weight'])
    assert sorted(n for n in os.listdir(tmp_path) if 'epoch_' in n and 'best' not in n) == [
        'epoch_3.safetensors',
        'epoch_4.safetensors',
    ]
    assert sum(n.startswith('best_accuracy_top1_epoch_') for n in os.listdir(tmp_path)) == 1


def test_testing_a_checkpoint_gives_the_score_of_validation(tmp_path):
    plain = {'val_dataloader.dataset.pipeline': [dict(type='PackInputs')]}
    runner = make(tmp_path, **plain)
    runner.train()
    score = runner.message_hub.get_scalar('val/accuracy/top1').current()
    again = make(tmp_path / 'again', load_from=str(tmp_path / 'epoch_4.safetensors'))
    assert again.test()['accuracy/top1'] == pytest.approx(score)
    assert equal(state(runner), state(again))


def corrupt(path, how):
    content = bytearray(path.read_bytes())
    if how == 'truncated':
        content = content[: len(content) // 2]
    elif how == 'flipped':
        content[-100] ^= 1
    else:
        content = bytearray()
    path.write_bytes(content)


@pytest.mark.parametrize('how', ['truncated', 'flipped', 'empty'])
def test_resume_falls_back_to_the_newest_intact_checkpoint(how, tmp_path, caplog):
    whole = make(tmp_path / 'whole')
    whole.train()
    with pytest.raises(Interrupted):
        make(tmp_path / 'cut', interrupt=14).train()
    corrupt(tmp_path / 'cut' / 'epoch_3.safetensors', how)
    resumed = make(tmp_path / 'cut', resume=True)
    with caplog.at_level('WARNING'):
        resumed.train()
    assert equal(state(whole), state(resumed))
    log = next((tmp_path / 'cut').glob('*/*.log'))
    text = ''.join(p.read_text() for p in log.parent.parent.glob('*/*.log'))
    assert 'epoch_3.safetensors is not a valid safetensors file' in text
    assert 'resuming from epoch_2.safetensors, the newest intact checkpoint' in text


def test_resume_with_nothing_intact_is_an_error(tmp_path):
    with pytest.raises(Interrupted):
        make(tmp_path, interrupt=6).train()
    corrupt(tmp_path / 'epoch_1.safetensors', 'truncated')
    with pytest.raises(DamagedFileError, match='none of the checkpoints in .* is intact.*epoch_1.safetensors'):
        make(tmp_path, resume=True).train()


def test_resume_without_checkpoints_begins_at_the_beginning(tmp_path):
    whole = make(tmp_path / 'whole')
    whole.train()
    with pytest.raises(Interrupted):
        make(tmp_path / 'cut', interrupt=3).train()
    (tmp_path / 'cut' / 'last_checkpoint').write_text('')  # as a kill inside a write leaves it
    resumed = make(tmp_path / 'cut', resume=True)
    resumed.train()
    assert equal(state(whole), state(resumed))


def test_files_of_an_earlier_run_are_not_taken(tmp_path):
    whole = make(tmp_path / 'whole')
    whole.train()
    make(tmp_path / 'cut', **{'randomness.seed': 9}).train()  # leaves epochs 3 and 4
    with pytest.raises(Interrupted):
        make(tmp_path / 'cut', interrupt=6).train()
    resumed = make(tmp_path / 'cut', resume=True)
    resumed.train()
    assert equal(state(whole), state(resumed))


def test_another_base_is_refused(tmp_path):
    with pytest.raises(Interrupted):
        make(tmp_path, interrupt=6).train()
    with pytest.raises(ValueError, match='the checkpoint was trained on another base'):
        make(tmp_path, resume=True, **{'randomness.seed': 5}).train()


def test_the_base_of_load_from_is_found_again(tmp_path):
    """``--resume`` takes the place of ``load_from``, where the base came from; the user names it, not the file."""
    base = make(tmp_path / 'base', **{'randomness.seed': 3})
    base.train()
    weights = {n: v for n, v in base.model.state_dict().items() if 'adapter' not in n}
    torch.save(dict(state_dict=weights), tmp_path / 'base.pth')
    given = dict(load_from=str(tmp_path / 'base.pth'))
    named = {'default_hooks.checkpoint.base': str(tmp_path / 'base.pth')}
    whole = make(tmp_path / 'whole', **given)
    whole.train()
    with pytest.raises(Interrupted):
        make(tmp_path / 'cut', interrupt=6, **given).train()
    with pytest.raises(Interrupted):
        make(tmp_path / 'cut', interrupt=10, resume=True, **named).train()
    with pytest.raises(WeightsError, match=r"load_from='.*base.pth'. A path in a file is never opened.*--base FILE"):
        make(tmp_path / 'cut', resume=True).train()
    resumed = make(tmp_path / 'cut', resume=True, **named)
    resumed.train()
    assert equal(state(whole), state(resumed))
    assert torch.equal(resumed.model.backbone.cls_token, base.model.backbone.cls_token)


def test_a_full_disk_keeps_the_old_checkpoints(tmp_path, monkeypatch):
    runner = make(tmp_path, **{'default_hooks.checkpoint.max_keep_ckpts': 1})
    from iconformer_mm.checkpoint import safetensors_io

    original, calls = safetensors_io.save_file, []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) > 4:
            with open(args[1], 'wb') as file:
                file.write(b'half of it')
            raise OSError(28, 'No space left on device')
        return original(*args, **kwargs)

    monkeypatch.setattr(safetensors_io, 'save_file', full)
    with pytest.raises(OSError, match='No space left'):
        runner.train()
    kept = [n for n in os.listdir(tmp_path) if n.endswith('.safetensors')]
    assert any(n.startswith('epoch_') for n in kept) and any(n.startswith('best_') for n in kept)
    for name in kept:
        load_safetensors(str(tmp_path / name))
    assert not [n for n in os.listdir(tmp_path) if n.startswith('.writing-')]


def test_the_hook_needs_a_frozen_backbone(tmp_path):
    runner = make(tmp_path)
    runner._hooks = [hook for hook in runner._hooks if type(hook).__name__ != 'PEFTHook']
    with pytest.raises(
        ValueError, match="must be adapted and frozen, but it is not adapted; use MMEngine's CheckpointHook"
    ):
        runner.train()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(filename_tmpl='x_{}.pth'), "must end in '.safetensors'"),
        (dict(filename_tmpl='{epoch}.safetensors'), 'cannot be filled in'),
        (dict(filename_tmpl='{:.2e}.safetensors'), 'cannot be read back'),
        (dict(out_dir='s3://bucket'), 'local folders only'),
        (dict(published_keys=['meta']), 'extract CHECKPOINT'),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdapterCheckpointHook(**options)


@pytest.mark.parametrize('template', ['epoch_{:03d}.safetensors', 'run/{0}.safetensors'])
def test_resume_honours_the_template_of_the_names(template, tmp_path):
    named = {'default_hooks.checkpoint.filename_tmpl': template}
    whole = make(tmp_path / 'whole', **named)
    whole.train()
    with pytest.raises(Interrupted):
        make(tmp_path / 'cut', interrupt=11, **named).train()
    assert (tmp_path / 'cut' / template.format(2)).is_file()
    resumed = make(tmp_path / 'cut', resume=True, **named)
    resumed.train()
    assert equal(state(whole), state(resumed))


def test_resume_does_not_begin_anew_beside_checkpoints_of_other_names(tmp_path):
    with pytest.raises(Interrupted):
        make(tmp_path, interrupt=6).train()
    with pytest.raises(ValueError, match=r"matches filename_tmpl 'e\{\}.safetensors', but .* epoch_1.safetensors"):
        make(tmp_path, resume=True, **{'default_hooks.checkpoint.filename_tmpl': 'e{}.safetensors'}).train()


def rewrite(path, change):
    """Change a checkpoint as whoever passes it on can."""
    checkpoint = load_safetensors(str(path))
    change(checkpoint)
    save_checkpoint(checkpoint, str(path))


def test_a_checkpoint_has_no_file_opened_executed_or_removed(tmp_path):
    """Its note names a base, its message hub what was best and what is outdated."""
    mark, bait = tmp_path / 'executed', tmp_path / 'bait'
    bait.mkdir()
    torch.save(dict(state_dict=dict(w=Evil(mark))), bait / 'base.pth')
    for name in ('best_x.safetensors', 'epoch_1.safetensors'):
        (bait / name).write_text('mine')
    with pytest.raises(Interrupted):
        make(tmp_path / 'run', interrupt=6).train()

    def change(checkpoint):
        checkpoint['meta']['config'] = f'open({str(mark)!r}, "w")'
        checkpoint['iconformer_mm'].update(load_from=str(bait / 'base.pth'))
        info = checkpoint['message_hub']['runtime_info']
        info.update(best_ckpt=str(bait / 'best_x.safetensors'), best_score=-1.0)
        info.update(keep_ckpt_ids=['../bait/epoch_1', '../bait/epoch_1', '../bait/epoch_1'])

    path = tmp_path / 'run' / 'epoch_1.safetensors'
    rewrite(path, change)
    make(tmp_path / 'run', resume=True).train()
    assert (tmp_path / 'run' / 'epoch_4.safetensors').is_file()
    other = {'randomness.seed': 5, 'load_from': str(tmp_path / 'run' / 'epoch_4.safetensors')}
    with pytest.raises(WeightsError, match='base.pth.*is never opened'):
        make(tmp_path / 'test', **other).test()
    assert not mark.exists() and sorted(p.name for p in bait.iterdir()) == [
        'base.pth',
        'best_x.safetensors',
        'epoch_1.safetensors',
    ]


class Evil:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, 'w')


EMA = dict(type='EMAHook', momentum=0.1)


@pytest.mark.parametrize(
    ('ema', 'weights'),
    [(EMA, 'averaged'), (dict(EMA, evaluate_on_ema=False, evaluate_on_origin=True), 'raw'), (None, 'raw')],
)
def test_files_hold_what_validation_measured_and_say_so(ema, weights, tmp_path):
    measured = {}

    class Measure(Hook):
        priority = 'LOWEST'

        def after_val_iter(self, runner, *args, **kwargs):
            measured.update(state(runner))

    runner = make(tmp_path, custom_hooks=[ema] if ema else [])
    runner.register_hook(Measure())
    runner.train()
    content, tensors = read_adapter(tmp_path / 'adapter.safetensors')
    assert content['notes']['weights'] == weights
    assert tensors and equal(tensors, {name: measured[name] for name in tensors})
    changed = not equal(tensors, {name: runner.model.state_dict()[name] for name in tensors})
    assert changed == (weights == 'averaged')
    # What is made of a checkpoint is the same, and the weights themselves are to be had.
    last = str(tmp_path / 'epoch_4.safetensors')
    assert adapter_tool(['extract', last, str(tmp_path / 'a.safetensors')]) == 0
    assert equal(read_adapter(tmp_path / 'a.safetensors')[1], tensors)
    assert adapter_tool(['extract', last, str(tmp_path / 'raw.safetensors'), '--raw']) == 0
    raw = read_adapter(tmp_path / 'raw.safetensors')[1]
    assert equal(raw, {name: runner.model.state_dict()[name] for name in raw})
    # The best one says its score; without the hook it is what was measured that is tested.
    (best,) = tmp_path.glob('best_*')
    score = load_safetensors(str(best))['iconformer_mm']['scores']['accuracy/top1']
    plain = {'val_dataloader.dataset.pipeline': [dict(type='PackInputs')]}
    again = make(tmp_path / 'again', load_from=last, **plain)
    again.test()
    assert equal(tensors, {name: again.model.state_dict()[name] for name in tensors})
    assert score == pytest.approx(runner.message_hub.get_info('best_score'))


def test_the_raw_weights_are_written_by_option(tmp_path):
    runner = make(tmp_path, custom_hooks=[EMA], **{'custom_hooks.0.save_adapter': 'raw'})
    runner.train()
    content, tensors = read_adapter(tmp_path / 'adapter.safetensors')
    assert content['notes']['weights'] == 'raw'
    assert equal(tensors, {name: runner.model.state_dict()[name] for name in tensors})


@HOOKS.register_module()
class DivergeHook(Hook):
    """Makes a weight NaN in an iteration, as a step that is too large does."""

    priority = 'HIGHEST'

    def __init__(self, at):
        self.at = at

    def after_train_iter(self, runner, *args, **kwargs):
        if runner.iter + 1 == self.at:
            runner.model.backbone.layers[0].adapter_attention.up.weight.data[0, 0] = torch.nan


@pytest.mark.filterwarnings('ignore')
def test_a_diverged_run_overwrites_no_good_file(tmp_path):
    make(tmp_path).train()
    before = {path.name: path.read_bytes() for path in tmp_path.glob('*.safetensors')}
    assert {'adapter.safetensors', 'epoch_3.safetensors', 'epoch_4.safetensors'} < before.keys()
    make(tmp_path, custom_hooks=[dict(type='DivergeHook', at=1)]).train()
    assert {path.name: path.read_bytes() for path in tmp_path.glob('*.safetensors')} == before
    text = ''.join(path.read_text() for path in tmp_path.glob('*/*.log'))
    assert 'no checkpoint is written: by iteration' in text and 'the training diverged: by iteration' in text
    assert 'adapter.safetensors is not written because the training diverged' in text
    # What it wrote before stays, too.
    late = tmp_path / 'late'
    make(late, custom_hooks=[dict(type='DivergeHook', at=9)]).train()
    assert sorted(path.name for path in late.glob('epoch_*')) == ['epoch_1.safetensors', 'epoch_2.safetensors']


def test_best_checkpoints_are_none_to_resume_from(tmp_path):
    make(tmp_path).train()
    (best,) = tmp_path.glob('best_*')
    with pytest.raises(DamagedFileError, match='it holds no optimizer, like those that scored best'):
        make(tmp_path / 'again', resume=True, load_from=str(best)).train()


def test_another_optimizer_is_refused(tmp_path):
    with pytest.raises(Interrupted):
        make(tmp_path, interrupt=6).train()
    with pytest.raises(DamagedFileError, match='epoch_1.safetensors cannot be resumed from'):
        make(tmp_path, resume=True, param_scheduler=[]).train()
