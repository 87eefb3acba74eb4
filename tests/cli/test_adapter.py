"""The command line over adapter files."""

import json
import os
import re
import subprocess
import sys
import uuid

import pytest
import torch
from conftest import ROOT
from mmengine.runner import Runner
from tiny_runs import config

from iconformer_mm import load_adapter
from iconformer_mm.checkpoint import read_adapter, save_safetensors
from iconformer_mm.checkpoint.adapter_file import write_adapter
from iconformer_mm.cli.adapter import main
from iconformer_mm.engine import build_runner


def call(capsys, *arguments):
    status = main([*map(str, arguments), '--json'])
    return status, json.loads(capsys.readouterr().out.splitlines()[-1])  # after loggers of the tests before


def build(work_dir, **changes):
    cfg = config(work_dir, **changes)
    cfg.experiment_name = uuid.uuid4().hex
    return build_runner(cfg)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A base, the adapter checkpoint, the whole checkpoint and the adapter file of one run."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('files')
    base = build(folder / 'base', custom_hooks=[])
    base.train()
    weights = {n: v for n, v in base.model.state_dict().items() if n.startswith('backbone.')}
    torch.save(dict(meta=dict(note='base'), state_dict=weights), folder / 'base.pth')
    small = {
        'default_hooks.checkpoint': dict(type='AdapterCheckpointHook', interval=1),
        'load_from': str(folder / 'base.pth'),
    }
    runner = build(folder / 'run', **small)
    runner.train()
    whole = build(folder / 'whole', load_from=str(folder / 'base.pth'))
    whole.train()
    config(folder / 'unused').dump(folder / 'config.py')
    folder.joinpath('state').mkdir()
    torch.save(runner.model.state_dict(), folder / 'state' / 'final.pt')
    return folder


def final(files):
    return torch.load(files / 'state' / 'final.pt')


def test_info(files, capsys):
    status, result = call(capsys, 'info', files / 'run' / 'adapter.safetensors')
    _, tensors = read_adapter(files / 'run' / 'adapter.safetensors')
    assert status == 0 and result['method']['type'] == 'icon' and result['method']['bottleneck'] == 8
    assert result['adapter_parameters'] + result['other_parameters'] == sum(v.numel() for v in tensors.values())
    assert result['sites'] == ['layers.0', 'layers.1'] and result['task'] == 'ImageClassifier'
    status, result = call(capsys, 'info', files / 'run' / 'epoch_2.safetensors')
    assert status == 0 and result['notes'] == dict(epoch=2, iter=8)
    assert main(['info', str(files / 'run' / 'adapter.safetensors')]) == 0  # for people
    assert 'bottleneck: 8' in capsys.readouterr().out


def test_extract_from_both_kinds_of_checkpoint(files, capsys, tmp_path):
    status, _ = call(capsys, 'extract', files / 'run' / 'epoch_2.safetensors', tmp_path / 'a.safetensors')
    assert status == 0
    arguments = [files / 'whole' / 'epoch_2.pth', tmp_path / 'b.safetensors', '--config', files / 'config.py']
    status, _ = call(capsys, 'extract', *arguments, '--trust-base')
    assert status == 0
    for name in ('a', 'b'):
        status, result = call(capsys, 'diff', tmp_path / f'{name}.safetensors', files / 'run' / 'adapter.safetensors')
        assert not result['largest_difference'] and result['metadata'].keys() <= {
            'classes',
            'task',
        }  # a checkpoint of MMEngine's does not say
        model = build(tmp_path / name, custom_hooks=[], load_from=str(files / 'base.pth'))
        model.load_or_resume()
        load_adapter(model.model, tmp_path / f'{name}.safetensors')
        assert all(torch.equal(v, model.model.state_dict()[n]) for n, v in final(files).items())


def test_extract_of_the_backbone_alone(files, capsys, tmp_path):
    out = tmp_path / 'a.safetensors'
    call(capsys, 'extract', files / 'run' / 'epoch_2.safetensors', out, '--backbone-only')
    assert all(name.startswith('backbone.') for name in read_adapter(out)[1])
    model = build(tmp_path / 'run', custom_hooks=[], load_from=str(files / 'base.pth'))
    model.load_or_resume()
    head = model.model.head.fc.weight.clone()
    load_adapter(model.model, out)
    assert torch.equal(model.model.head.fc.weight, head)
    assert torch.equal(
        model.model.backbone.layers[0].adapter_attention.up.weight,
        final(files)['backbone.layers.0.adapter_attention.up.weight'],
    )


def test_applied_checkpoint_is_what_stock_tools_take(files, capsys, tmp_path):
    out = tmp_path / 'whole.pth'
    status, _ = call(capsys, 'apply', files / 'base.pth', files / 'run' / 'adapter.safetensors', out)
    assert status == 0
    cfg = config(tmp_path / 'run', load_from=str(out))
    cfg.experiment_name = uuid.uuid4().hex
    runner = Runner.from_cfg(cfg)
    score = runner.test()['accuracy/top1']
    assert all(torch.equal(v, runner.model.state_dict()[n]) for n, v in final(files).items())
    again = build(tmp_path / 'again', load_from=str(files / 'whole' / 'epoch_2.pth'))
    assert score == pytest.approx(again.test()['accuracy/top1'])
    torch.load(out, weights_only=True)
    assert os.listdir(tmp_path).count('whole.pth') == 1


def test_diff(files, capsys, tmp_path):
    first, last = files / 'run' / 'epoch_1.safetensors', files / 'run' / 'epoch_2.safetensors'
    assert call(capsys, 'diff', first, first) == (0, call(capsys, 'diff', first, first)[1])
    status, result = call(capsys, 'diff', first, last)
    assert status == 1 and not result['same'] and not result['metadata']
    a, b = read_first(first), read_first(last)
    name = 'head.fc.weight'
    assert result['largest_difference'][name] == pytest.approx(float((a[name] - b[name]).abs().max()))


def read_first(path):
    from iconformer_mm.cli.adapter import read_any

    return read_any(path)[1]


def test_verify(files, capsys, tmp_path):
    file = files / 'run' / 'adapter.safetensors'
    assert call(capsys, 'verify', file)[0] == 0
    status, result = call(capsys, 'verify', file, '--base', files / 'base.pth')
    assert status == 0 and result['fits_base']
    other = torch.load(files / 'base.pth')['state_dict']
    half = {n.removeprefix('backbone.'): v.half() for n, v in other.items()}  # bare names, half precision
    torch.save(half, tmp_path / 'half.pth')
    assert call(capsys, 'verify', file, '--base', tmp_path / 'half.pth')[0] == 0
    half['cls_token'] = half['cls_token'] + 1
    torch.save(half, tmp_path / 'other.pth')
    status, result = call(capsys, 'verify', file, '--base', tmp_path / 'other.pth')
    assert status == 1 and 'is not the base the adapter was trained on' in result['reason']


class Evil:
    def __reduce__(self):
        return (os.system, (f'touch {os.environ.get("EVIL_MARK", "/tmp/none")}',))


def test_what_cannot_be_read_is_status_3(files, capsys, tmp_path, monkeypatch):
    file = files / 'run' / 'adapter.safetensors'
    monkeypatch.setenv('EVIL_MARK', str(tmp_path / 'executed'))
    torch.save(dict(state_dict=dict(x=Evil())), tmp_path / 'evil.pth')
    (tmp_path / 'half.safetensors').write_bytes(file.read_bytes()[:1000])
    torch.save(dict(state_dict=dict(x=torch.ones(1))), tmp_path / 'foreign.pth')
    torch.save(dict(state_dict=dict(x='text')), tmp_path / 'text.pth')
    (tmp_path / 'half.pth').write_bytes((files / 'base.pth').read_bytes()[:1000])
    for arguments, message in (
        (('info', tmp_path / 'none.safetensors'), 'does not exist'),
        (('info', tmp_path / 'half.safetensors'), 'not a valid safetensors file'),
        (('verify', file, '--base', tmp_path / 'evil.pth'), 'could execute code'),
        (('extract', tmp_path / 'evil.pth', '--config', files / 'config.py'), 'could execute code'),
        (('extract', tmp_path / 'foreign.pth'), 'its --config is needed'),
        (('verify', file, '--base', tmp_path / 'text.pth'), 'it holds no `state_dict` of tensors'),
        (('verify', file, '--base', tmp_path / 'half.pth'), 'half.pth is not a valid checkpoint'),
        (('verify', file, '--base', tmp_path / 'foreign.pth'), 'lacks .* tensors of the base'),
    ):
        status, result = call(capsys, *arguments)
        assert status == 3
        assert re.search(message, result['error'])
        assert main([*map(str, arguments)]) == 3
        out, err = capsys.readouterr()
        assert not out and re.search(message, err.splitlines()[-1]) and err.splitlines()[-1].startswith('error: ')
    assert not (tmp_path / 'executed').exists()


def run_tool(*arguments, **kwargs):
    command = [sys.executable, str(ROOT / 'tools' / 'adapter.py'), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((), 'arguments are required: command'),
        (('inf', 'x'), "invalid choice: 'inf'"),
        (('verify', 'x', '--bse', 'y'), r"unknown option '--bse' \(did you mean '--base'\?\)"),
        (('diff', 'x'), 'arguments are required: b'),
        (('info', '.'), 'does not exist'),
    ],
)
@pytest.mark.parametrize('json_too', [False, True])
def test_a_wrong_command_line_is_one_line_and_status_3(arguments, message, json_too, capsys):
    assert main([*arguments, *(['--json'] if json_too else [])]) == 3
    out, err = capsys.readouterr()
    assert re.search(message, err) and err.count('\n') == 1
    if json_too:
        assert re.search(message, json.loads(out)['error'])
    else:
        assert not out


def test_a_mistake_in_a_process_of_its_own():
    result = run_tool('verify', 'x', '--bse', 'y')
    assert result.returncode == 3 and not result.stdout
    assert result.stderr == "error: unknown option '--bse' (did you mean '--base'?)\n"


def test_help_is_no_error(capsys):
    assert main(['diff', '--help']) == 0
    out, err = capsys.readouterr()
    assert 'usage' in out and not err


def test_what_nobody_expected_is_status_3(files, capsys, monkeypatch):
    def fail(*args):
        raise ZeroDivisionError('two\nlines')

    file = files / 'run' / 'adapter.safetensors'
    monkeypatch.setattr('iconformer_mm.cli.adapter.read_safetensors', fail)
    assert main(['info', str(file)]) == 3
    assert capsys.readouterr().err == 'error: ZeroDivisionError: two lines\n'
    monkeypatch.setattr('iconformer_mm.cli.adapter.read_safetensors', lambda *args: sys.exit(1))
    assert call(capsys, 'info', file)[0] == 3


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_a_folder_that_cannot_be_written(files, capsys, tmp_path):
    tmp_path.chmod(0o500)
    out = tmp_path / 'a.safetensors'
    status, result = call(capsys, 'extract', files / 'run' / 'epoch_2.safetensors', out)
    assert status == 3 and 'Permission denied' in result['error']


def test_a_file_where_a_folder_is_needed(files, capsys, tmp_path):
    (tmp_path / 'file').write_text('')
    status, result = call(capsys, 'extract', files / 'run' / 'epoch_2.safetensors', tmp_path / 'file' / 'a.safetensors')
    assert status == 3 and str(tmp_path / 'file') in result['error']


def strict_json(text):
    def refuse(name):
        raise ValueError(f'{name} is no JSON')

    return json.loads(text, parse_constant=refuse)


def test_json_has_no_numbers_that_json_does_not_know(files, capsys, tmp_path):
    content, tensors = read_adapter(files / 'run' / 'adapter.safetensors')
    content['notes'] = dict(loss=float('nan'), rates=[float('inf'), 1.5], best=float('-inf'))
    tensors = {name: value.clone() for name, value in tensors.items()}
    text = json.dumps(content)  # as releases wrote it that let such numbers pass
    save_safetensors(tensors, tmp_path / 'a.safetensors', {'iconformer_mm': text})
    assert main(['info', str(tmp_path / 'a.safetensors'), '--json']) == 0
    notes = strict_json(capsys.readouterr().out.splitlines()[-1])['notes']
    assert notes == dict(loss=None, rates=[None, 1.5], best=None)
    tensors['head.fc.bias'][0] = float('nan')
    save_safetensors(tensors, tmp_path / 'b.safetensors', {'iconformer_mm': text})
    assert main(['diff', str(tmp_path / 'a.safetensors'), str(tmp_path / 'b.safetensors'), '--json']) == 1
    assert strict_json(capsys.readouterr().out.splitlines()[-1])['largest_difference'] == {'head.fc.bias': 'NaN'}
    assert main(['diff', str(tmp_path / 'b.safetensors'), str(tmp_path / 'b.safetensors'), '--json']) == 0
    assert strict_json(capsys.readouterr().out.splitlines()[-1])['same']


def test_other_dtypes_differ(files, capsys, tmp_path):
    content, tensors = read_adapter(files / 'run' / 'adapter.safetensors')
    tensors['head.fc.bias'] = tensors['head.fc.bias'].half()
    write_adapter(tmp_path / 'a.safetensors', content, tensors)
    status, result = call(capsys, 'diff', files / 'run' / 'adapter.safetensors', tmp_path / 'a.safetensors')
    assert status == 1 and result['other_type'] == ['head.fc.bias'] and not result['other_shape']


def test_what_a_file_says_is_no_markup(files, capsys, tmp_path):
    content, tensors = read_adapter(files / 'run' / 'adapter.safetensors')
    content['notes'] = dict(a='[/red]', b='[red]x', c='\ud800')
    write_adapter(tmp_path / 'a.safetensors', content, tensors)
    assert main(['info', str(tmp_path / 'a.safetensors')]) == 0
    out = capsys.readouterr().out
    assert 'a: [/red]' in out and 'b: [red]x' in out and r'\ud800' in out


def test_who_reads_the_output_may_go(files):
    command = f'{sys.executable} {ROOT / "tools" / "adapter.py"} info {files / "run" / "adapter.safetensors"} | true'
    command += '; echo ${PIPESTATUS[0]}'
    result = subprocess.run(['bash', '-c', command], capture_output=True, text=True)
    assert result.stdout.strip() == '3' and not result.stderr


def test_as_a_module_and_as_a_tool(files):
    for start in (['-m', 'iconformer_mm.adapter'], [str(ROOT / 'tools' / 'adapter.py')]):
        command = [sys.executable, *start, 'verify', str(files / 'run' / 'adapter.safetensors'), '--json']
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0 and json.loads(result.stdout)['intact']
