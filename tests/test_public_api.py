"""The public API is what docs/api.md lists."""

import difflib
import importlib
import inspect
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / 'tools'))
import list_api  # noqa: E402


def test_the_listing_is_that_of_the_code():
    _, marker, listed = list_api.GUIDE.read_text(encoding='utf-8').partition(list_api.MARKER)
    assert marker
    changed = difflib.unified_diff(listed.splitlines(), list_api.listing().splitlines(), 'docs/api.md', 'code', n=0)
    changes = '\n'.join(changed)
    assert not changes, (
        'the public API has changed. If that is meant, run `python tools/list_api.py` and say so in CHANGELOG.md; '
        f'docs/api.md has the rules\n{changes}'
    )


@pytest.mark.parametrize('path', list_api.MODULES)
def test_all_names_have_docstrings(path):
    module = importlib.import_module(f'iconformer_mm{path}')
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.isfunction(thing) or inspect.isclass(thing):
            assert inspect.getdoc(thing), name


def example(first: 'int', *rest: 'str | None', last: 'tuple[int, ...]' = (1,)) -> 'dict[str, int]':
    """A function with what signatures are made of."""


class Parent:
    def __init__(self, size: int = 3) -> None:
        self.size = size

    def taken(self) -> None:
        """A listed class has it already."""


class Child(Parent):
    def __call__(self, x: float) -> float:
        return x

    @property
    def area(self) -> int:
        return self.size**2

    @classmethod
    def make(cls, kind: str) -> None:
        """An other constructor."""

    @staticmethod
    def check(value: int) -> None:
        """Without the instance."""

    def taken(self) -> None:
        """As the parent's."""

    def _hidden(self) -> None:
        """Not public."""


def test_signatures_are_shown_as_written(monkeypatch):
    lines = list_api.describe('example', example, ['example'])
    assert lines == ['example(first: int, *rest: str | None, last: tuple[int, ...] = (1,)) -> dict[str, int]']
    monkeypatch.setattr(list_api, 'PACKAGE', __name__)
    assert list_api.describe('Child', Child, ['Child', 'Parent']) == [
        'class Child(size: int = 3)',
        '    __call__(x: float) -> float',
        '    area: int',
        '    make(kind: str) -> None',
        '    check(value: int) -> None',
    ]
    assert '    taken() -> None' in list_api.describe('Child', Child, ['Child'])
