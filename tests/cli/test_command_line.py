"""A mistake on the command line, or in a config, is one line that says what was probably meant."""

import re
import sys
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from conftest import free_port
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS, init_default_scope

from iconformer_mm.cli.errors import user_errors
from iconformer_mm.cli.parser import Parser, make_parser
from iconformer_mm.datasets.checks import DataError
from iconformer_mm.engine import add_peft, load_config
from iconformer_mm.engine.config import merge_options
from iconformer_mm.engine.mistakes import explain
from iconformer_mm.registry import accepted
from iconformer_mm.tuning.methods import build_method

DIGITS = 'configs/quickstart/vit-quickstart_icon_digits.py'


def ends_with(function, *arguments):
    """What a function ends the program with."""
    with pytest.raises(SystemExit) as end:
        function(*arguments)
    return end.value.code


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['a.py', '--wrok-dir', 'x'], "unknown option '--wrok-dir' (did you mean '--work-dir'?)"),
        (['--wrok-dir=x'], "unknown option '--wrok-dir' (did you mean '--work-dir'?)"),
        (['a.py', '--zzzzzz'], "unknown option '--zzzzzz'; see "),
        (['a.py', '--launcher', 'slrm'], "argument --launcher: invalid choice: 'slrm'"),
        ([], 'the following arguments are required: config'),
        (['a.py', '--cfg-options', 'resume'], "--cfg-options takes key=value, got 'resume'"),
        (['a.py', '--cfg-options', '=3'], "--cfg-options takes key=value, got '=3'"),
        (['a.py', '--cfg-options', 'a=[1,(2]'], '--cfg-options: a=[1,(2] cannot be read'),
    ],
)
def test_options(arguments, message, capsys):
    assert ends_with(make_parser('A tool.').parse_args, arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith('error: ') and message in err and err.count('\n') == 1


def test_options_that_are_right():
    args = make_parser('A tool.').parse_args(['a.py', '--cfg-options', 'a.b=[1,2]', 'c=d=e', '--work', 'x'])
    assert args.cfg_options == {'a.b': [1, 2], 'c': 'd=e'} and args.work_dir == 'x'  # a shorter form is as good


def test_options_of_commands(capsys):
    parser = Parser(prog='p')
    command = parser.add_subparsers(dest='command').add_parser('run')
    command.add_argument('--quick', action='store_true')
    assert ends_with(parser.parse_args, ['run', '--quik']) == 2
    assert capsys.readouterr().err == "error: unknown option '--quik' (did you mean '--quick'?)\n"


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('optim_wraper.optimizer.lr', "there is no setting 'optim_wraper' (did you mean 'optim_wrapper'?)"),
        ('resum', "there is no setting 'resum' (did you mean 'resume'?)"),
        ('something', "there is no setting 'something'"),
        ('model.bakbone.depth', "there is no 'bakbone' (did you mean 'backbone'?)"),
        ('train_cfg.max_epoch', "there is no 'max_epoch' (did you mean 'max_epochs'?)"),
        ('default_hooks.chekpoint.interval', "there is no 'chekpoint' (did you mean 'checkpoint'?)"),
        ('custom_hooks.7.interval', "'7' is none of the 1 items, 0 to 0"),
        ('custom_hooks.first.interval', "'first' is none of the 1 items"),
        ('model.head.num_classes.x', 'cannot inherit from base'),
    ],
)
def test_settings_that_nobody_reads(name, message, root):
    cfg = load_config(str(root / DIGITS))
    before = cfg.to_dict()
    with pytest.raises(ValueError, match='--cfg-options') as error:
        merge_options(cfg, {name: 1})
    assert message in str(error.value) and '\n' not in str(error.value)
    assert cfg.to_dict() == before


@pytest.mark.parametrize(
    'options',
    [
        None,
        {'randomness.seed': 1},
        {'load_from': 'a.pth'},
        {'auto_scale_lr.enable': True},
        {'custom_hooks.0.method.bottleneck': 4},
        {'model.backbone.drop_path_rate': 0.1},
        {'model.test_cfg.mode': 'slide'},
        {'default_hooks.peft.save_adapter': False},
        {'train_dataloader.dataset.pipeline.1.padding': 0},
        {'model.head.out_channels': 1, 'model.head.in_channels': 3},
    ],
)
def test_settings_that_are_new_or_there(options, root):
    cfg = load_config(str(root / DIGITS))
    merge_options(cfg, options)
    for name, value in (options or {}).items():
        node = cfg
        for key in name.split('.'):
            node = node[int(key)] if key.isdigit() else node[key]
        assert node == value


def error_of(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except Exception as error:
        return error
    raise AssertionError('there was no error')


def test_unknown_arguments_and_names_in_configs():
    init_default_scope('mmpretrain')
    backbone = dict(type='VisionTransformer', arch='b', imgsize=224)
    found = explain(error_of(MODELS.build, backbone))
    assert found == "error: unknown option 'imgsize' of VisionTransformer (did you mean 'img_size'?)"
    # With arguments that a base class takes.
    found = explain(error_of(MODELS.build, dict(type='LinearClsHead', num_classes=2, in_channels=3, los=None)))
    assert found == "error: unknown option 'los' of LinearClsHead (did you mean 'loss'?)"
    found = explain(error_of(MODELS.build, dict(type='VisionTransfomer')))
    assert "there is no 'VisionTransfomer'" in found and "(did you mean 'VisionTransformer'?)" in found
    found = explain(error_of(HOOKS.build, dict(type='PEFTHok')))
    assert "(did you mean 'PEFTHook'?)" in found


def test_mistakes_inside_of_data_sets(root):
    from iconformer_mm.engine import CheckedRunner

    cfg = load_config(str(root / DIGITS))
    init_default_scope('mmpretrain')
    loader = cfg.train_dataloader
    loader.dataset.pipeline[1].paddin = 3
    found = explain(error_of(CheckedRunner.build_dataloader, loader, seed=0))
    assert found == "error: unknown option 'paddin' of RandomCrop (did you mean 'padding'?)"
    loader.dataset.pipeline[1].pop('paddin')
    loader.batchsize = loader.pop('batch_size')
    found = explain(error_of(CheckedRunner.build_dataloader, loader, seed=0))
    assert found == "error: unknown option 'batchsize' of DataLoader (did you mean 'batch_size'?)"


def vit(**init_cfg):
    """Build a small ViT and load its weights."""
    arch = dict(embed_dims=8, num_layers=1, num_heads=1, feedforward_channels=8)
    cfg = dict(type='VisionTransformer', arch=arch, img_size=32, init_cfg=dict(type='Pretrained', **init_cfg))
    init_default_scope('mmpretrain')
    MODELS.build(cfg).init_weights()


def test_weights_that_cannot_be_had(tmp_path, monkeypatch):
    url = f'http://127.0.0.1:{free_port()}/deit.pth'
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    found = explain(error_of(vit, checkpoint=url))
    assert re.fullmatch(
        rf'error: the weights {url} cannot be downloaded \(.*refused.*\)\. Download .* `iconformer .*', found
    )
    found = explain(error_of(vit, checkpoint=str(tmp_path / 'deti.pth')))
    assert found == f'error: the file of weights {tmp_path}/deti.pth does not exist'
    torch.save(dict(state_dict=dict(a=torch.ones(1))), tmp_path / 'a.pth')
    found = explain(error_of(vit, checkpoint=str(tmp_path / 'a.pth'), prefix='backbone.'))
    assert found.startswith(f"error: no tensor of the weights {tmp_path}/a.pth has a name that begins with 'backbone.'")


def test_weights_of_timm_that_cannot_be_had(tmp_path, monkeypatch):
    import timm
    from huggingface_hub import constants

    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path))
    found = explain(error_of(timm.create_model, 'vit_tiny_patch16_224', pretrained=True))
    assert found.startswith('error: the weights timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k cannot be downloaded (')


def test_what_is_explained_and_what_is_not():
    assert explain(DataError('a\nb')) == 'error in the data: a b'
    assert explain(error_of(build_method, 'icn')).startswith("error: unknown PEFT method 'icn' (did you mean 'icon'?)")
    assert explain(ValueError('of another library')) is None and explain(ZeroDivisionError()) is None
    assert explain(TypeError('unsupported operand')) is None and explain(KeyError('x')) is None


def test_a_program_s_own_error_keeps_its_traceback():
    @user_errors
    def broken():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()

    @user_errors
    def mistaken():
        build_method('icn')

    assert 'unknown PEFT method' in ends_with(mistaken)


def test_accepted_arguments():
    class Base:
        def __init__(self, a, b=1):
            pass

    class Child(Base):
        def __init__(self, c, **kwargs):
            pass

    assert accepted(Child) == {'a', 'b', 'c'} and accepted(Base) == {'a', 'b'} and accepted(lambda x: x) == {'x'}


def test_methods_are_looked_up_before_anything_is_built(root):
    cfg = Config(dict(model=dict()))
    with pytest.raises(ValueError, match=r"unknown PEFT method 'icn' \(did you mean 'icon'\?\)"):
        load_config(str(root / DIGITS), 'icn')
    with pytest.raises(ValueError, match=r"unknown option 'botleneck' .* \(did you mean 'bottleneck'\?\)"):
        add_peft(cfg, dict(type='icon', botleneck=3))
    assert 'default_hooks' not in cfg


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('a = (', 'SyntaxError'),
        ('a = 1 / 0', 'ZeroDivisionError: division by zero'),
        ("_base_ = './none.py'", 'none.py'),
        ("custom_imports = dict(imports=['nothing_of_this_name'])", 'nothing_of_this_name'),
    ],
)
def test_a_config_that_cannot_be_read(text, message, tmp_path):
    (tmp_path / 'a.py').write_text(text)
    found = explain(error_of(load_config, str(tmp_path / 'a.py')))
    assert found.startswith(f"error: config '{tmp_path}/a.py'") and message in found and '\n' not in found


TOOLS = {
    'train': (['CONFIG', '--wrok-dir', 'x'], '--work-dir'),
    'test': (['CONFIG', 'a.pth', '--metric', 'x', '--shw-dir', 'y'], '--show-dir'),
    'find_lr': (['CONFIG', '--iter', '3', '--min-rl', '1'], '--min-lr'),
    'inspect_model': (['CONFIG', '--shap', '3', '3', '--jsno'], '--json'),
    'predict': (['a.png', '--confg', 'CONFIG'], '--config'),
    'visualize_icon': (['a.png', '--adaptr', 'a'], '--adapter'),
    'convert_adapter': (['a.pth', '--form', 'mona'], '--from'),
    'convert_backbone': (['a.pth', 'b', '--too', 'timm'], '--to'),
    'fetch_real': (['--weel', 'x'], '--wheel'),
    'export_backbone': (['a.pth', 'b', '--prefx', 'x'], '--prefix'),
    'report': (['folder', '--max-mb', '3'], '--max-mib'),
    'compare': (['a.yaml', '--minute', '3', '--task-s', 'x'], '--tasks'),
    'make_scenes': (['--stiles', 'target'], '--styles'),
    'real_images': (['digits', '--shot', '3', '--sead', '1'], '--seed'),
    'nyu': (['a', 'b', '--ot', 'x', '--outt', 'y'], '--out'),
}


@pytest.mark.parametrize('name', TOOLS)
def test_every_tool_names_the_nearest_option(name, root, monkeypatch, capsys):
    arguments, nearest = TOOLS[name]
    folder = root / 'tools'
    folder = folder / 'dataset_converters' if name in ('make_scenes', 'nyu', 'real_images') else folder
    monkeypatch.syspath_prepend(str(root / 'tools'))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, 'argv', [f'{name}.py', *arguments])
    assert ends_with(import_module(name).main) == 2
    out, err = capsys.readouterr()
    assert err.splitlines()[-1].startswith('error: unknown option') and f"did you mean '{nearest}'?" in err
    assert 'usage' not in out + err


@pytest.mark.parametrize('tool', ['train', 'test', 'find_lr', 'inspect_model'])
@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--peft', 'icn'], "error: unknown PEFT method 'icn' (did you mean 'icon'?)"),
        (
            ['--cfg-options', 'modl.x=1'],
            "error: --cfg-options modl.x: there is no setting 'modl' (did you mean 'model'?)",
        ),
        (['--cfg-options', 'model.head.num_clases=3'], "error: unknown option 'num_clases' of LinearClsHead"),
        (['--cfg-options', 'custom_hooks.0.method.botleneck=3'], "unknown option 'botleneck' of PEFT method 'icon'"),
    ],
)
def test_mistakes_in_settings_end_every_tool_with_one_line(tool, arguments, message, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(root / 'tools'))
    (tmp_path / 'a.pth').write_bytes(b'')
    given = [str(root / DIGITS), *(['a.pth'] if tool == 'test' else []), *arguments]
    monkeypatch.setattr(sys, 'argv', [f'{tool}.py', *given])
    end = ends_with(import_module(tool).main)
    assert message in end and '\n' not in end


def test_a_library_that_a_release_of_transformers_breaks(monkeypatch):
    """MMPretrain derives a class from None, where transformers has its base no longer."""
    source = compile('class BertPreTrainedModel(None):\n    pass', 'language_model.py', 'exec')
    error = error_of(exec, source, dict(__name__='mmpretrain.models.blip'))
    monkeypatch.setitem(sys.modules, 'transformers', SimpleNamespace(__version__='5.24.0'))
    assert explain(error) == (
        'error: mmpretrain.models.blip cannot be imported beside transformers 5.24.0 (NoneType takes no arguments): '
        "pip install 'transformers>=4.40,<4.50', or uninstall it where no model reads text"
    )
    assert explain(error_of(exec, source, dict(__name__='mine'))) is None
    monkeypatch.delitem(sys.modules, 'transformers')
    assert explain(error) is None
