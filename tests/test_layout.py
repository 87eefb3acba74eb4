"""Where things are: packages import one way, tests mirror the package, and tools hold no code of their own."""

import ast
from collections import Counter

import pytest
from conftest import ROOT

PACKAGE = ROOT / 'iconformer_mm'
# Each imports from those before it only. Those of one line do not know one another.
LAYERS = (
    ('extras',),
    ('version', 'compat', 'messages', 'files', 'fetching', 'figures', 'registry', 'deprecation'),
    ('ops',),
    ('adapters',),
    ('tuning',),
    ('checkpoint',),
    ('datasets', 'models'),
    ('engine',),
    ('inference',),
    ('analysis', 'serving'),
    ('comparison',),
    ('reports',),
    ('cli',),
    ('__init__', '__main__', 'adapter', 'apis', 'visualization'),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported(path):
    """What of the package a module imports, as parts of its name, wherever in the module that stands."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            names = [alias.name.split('.') for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = list(package[: len(package) - node.level + 1]) if node.level else []
            module = start + (node.module.split('.') if node.module else [])
            names = [[*module, alias.name] for alias in node.names]
        else:
            continue
        yield from (name for name in names if name[0] == PACKAGE.name)


def part_of(name):
    """The package or module that a name lies in; names of the package itself come from its ``__init__``."""
    return name[1] if len(name) > 1 and name[1] in LEVEL else '__init__'


def test_the_picture_of_imports():
    """That of docs/design.md, from the top down."""
    text = (ROOT / 'docs' / 'design.md').read_text(encoding='utf-8')
    picture = text.partition('```text\n')[2].partition('```')[0]
    assert [tuple(line.split()) for line in picture.splitlines()] == list(reversed(LAYERS[:-1]))


def test_every_part_has_a_layer():
    parts = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir() if path.name != '__pycache__'}
    assert parts - {'py', 'py.typed'} == set(LEVEL)


@pytest.mark.parametrize('name', [name for name in LEVEL if name not in LAYERS[-1]])
def test_a_part_imports_from_the_layers_below(name):
    module = PACKAGE / f'{name}.py'
    for path in [module] if module.is_file() else sorted((PACKAGE / name).rglob('*.py')):
        for found in imported(path):
            other = part_of(found)
            if other == '__init__':
                # What the package offers to all, from its lower layers; only those above them all may ask it.
                assert LEVEL[name] > LEVEL['engine'], f'{path} imports {".".join(found)}'
            else:
                assert other == name or LEVEL[other] < LEVEL[name], f'{path} imports {".".join(found)}'


def test_modules_of_a_part_import_one_another_one_way():
    """No circle of imports among the modules, not even one that is cut by an import within a function."""
    graph = {}
    for path in PACKAGE.rglob('*.py'):
        parts = list(path.relative_to(ROOT).with_suffix('').parts)
        own = '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)
        graph[own] = {'.'.join(name[:end]) for name in imported(path) for end in (len(name), len(name) - 1)} - {own}
    graph = {name: {other for other in others if other in graph} for name, others in graph.items()}
    # A package's __init__ imports its modules, which is no circle with theirs of it: they name the module itself.
    packages = {name for name in graph if any(other.startswith(f'{name}.') for other in graph)}
    graph = {name: others - packages for name, others in graph.items() if name not in packages}
    while free := [name for name, others in graph.items() if not others & graph.keys()]:
        for name in free:
            del graph[name]
    assert graph == {}


TOOLS = [*(ROOT / 'tools').glob('*.py'), *(ROOT / 'tools' / 'dataset_converters').glob('*.py')]


@pytest.mark.parametrize('path', TOOLS, ids=lambda path: path.name)
def test_tools_hold_no_code_of_their_own(path):
    text = path.read_text(encoding='utf-8')
    assert len(text.splitlines()) <= 10 and 'from iconformer_mm.cli.' in text
    nodes = list(ast.walk(ast.parse(text)))
    assert not [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.For, ast.While))]


def test_every_command_is_a_module():
    from iconformer_mm.cli.main import COMMANDS

    for module, _ in COMMANDS.values():
        assert (PACKAGE / 'cli' / f'{module}.py').is_file()


def test_tests_have_names_of_their_own():
    """They are no package, so that two of one name would be one module."""
    names = Counter(path.name for path in (ROOT / 'tests').rglob('*.py') if path.name != 'conftest.py')
    assert [name for name, number in names.items() if number > 1] == []


def test_folders_of_tests_are_parts_of_the_package():
    folders = {path.name for path in (ROOT / 'tests').iterdir() if path.is_dir() and any(path.glob('test_*.py'))}
    assert folders <= {*LEVEL, 'tools', 'real'}


def test_no_test_module_imports_another():
    """What several share is in a module that is no test."""
    modules = {path.stem: path for path in (ROOT / 'tests').rglob('test_*.py')}
    for path in modules.values():
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.ImportFrom):
                assert node.module not in modules, f'{path.name} imports {node.module}'
            elif isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & set(modules), path.name
