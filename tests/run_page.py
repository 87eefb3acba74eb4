"""Runs a page of the documentation as a reader would: its blocks in order, in one folder.

    python tests/run_page.py docs/own_backbone.md FOLDER

- A ``python`` block is executed, all of a page in one scope. One that begins with a
  file's name in a comment (``# my_config.py``) is written to that file instead.
- A ``bash`` block is run, from a folder with the checkout's ``configs``, ``tools``, ...
- A ``text`` block is what the block before prints, among other things; ``...`` stands for anything.
- ``<!-- not run: the reason -->`` before a block excepts it.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from commands import run

ROOT = Path(__file__).resolve().parent.parent
LINKED = ('benchmarks', 'configs', 'docs', 'examples', 'iconformer_mm', 'requirements', 'tools')
BLOCK = re.compile(r'(?:^<!-- not run: (?P<why>[^\n]+) -->\n)?^```(?P<kind>\w+)\n(?P<code>.*?)^```', re.M | re.S)
FILE = re.compile(r'# ([\w/]+\.\w+)\n')


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        kind: Its language.
        code: Its text.
        line: The line in the page where it begins.
        not_run: Why it is not run, None if it is.
    """

    kind: str
    code: str
    line: int
    not_run: str | None


def read_blocks(page: Path, kind: str | None = None) -> list[Block]:
    """The blocks of a page, all or those of a language."""
    text = page.read_text(encoding='utf-8')
    found = [
        Block(m['kind'], m['code'], text[: m.start('code')].count('\n') + 1, m['why']) for m in BLOCK.finditer(text)
    ]
    return [block for block in found if kind is None or block.kind == kind]


def run_python(code: str, scope: dict, name: str) -> str:
    """Execute a block, or write the file that it is; return what it printed."""
    file = FILE.match(code)
    if file:
        Path(file[1]).parent.mkdir(parents=True, exist_ok=True)
        Path(file[1]).write_text(code, encoding='utf-8')
        return ''
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            exec(compile(code, name, 'exec'), scope)
        except BaseException:
            traceback.print_exc()
            raise SystemExit(f'{name} fails:\n{code}\n{printed.getvalue()[-3000:]}') from None
    return printed.getvalue()


def plain_commands(code: str) -> list[list[str]] | None:
    """The words of a block's commands, if each runs a Python file and needs no shell; else None."""
    commands = []
    for line in code.replace('\\\n', ' ').splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[0] == 'iconformer':
            words = ['python', str(Path(sys.executable).parent / 'iconformer'), *words[1:]]
        if words[0] != 'python' or words[1].startswith('-') or set(''.join(words)) & set('|&;<>$`*?~(){}'):
            return None
        commands.append(words[1:])
    return commands


def run_bash(code: str, name: str) -> str:
    """Run a block; return what it printed."""
    commands = plain_commands(code)
    if commands is not None:
        try:
            return ''.join(run(*words, cwd=Path.cwd()) for words in commands)
        except AssertionError as error:
            raise SystemExit(f'{name} fails:\n{code}\n{error}') from None
    env = {**os.environ, 'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}', 'PYTHONPATH': str(ROOT)}
    result = subprocess.run(['bash', '-euo', 'pipefail', '-c', code], env=env, capture_output=True, text=True)
    printed = result.stdout + result.stderr
    if result.returncode:
        raise SystemExit(f'{name} fails with {result.returncode}:\n{code}\n{printed[-3000:]}')
    return printed


def check_printed(expected: str, printed: str, name: str) -> None:
    """Compare what a page says is printed with what was; the width of space does not count."""
    plain = ' '.join(printed.split())
    for line in filter(str.strip, expected.splitlines()):
        pattern = '.*'.join(re.escape(' '.join(part.split())) for part in line.split('...'))
        if not re.search(pattern, plain):
            raise SystemExit(f'{name}: not printed: {line}\nprinted was:\n{printed[-3000:]}')


def link_checkout(folder: Path) -> None:
    """Make a folder in which a page can be run."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)


def main() -> None:
    """Run the page in the folder."""
    page, folder = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    link_checkout(folder)
    os.chdir(folder)
    sys.path.insert(0, '.')
    scope: dict = {'__name__': '__main__'}
    printed, run = '', 0
    for block in read_blocks(page):
        name = f'{page.name}:{block.line}'
        if block.not_run:
            continue
        if block.kind == 'python':
            printed = run_python(block.code, scope, name)
        elif block.kind == 'bash':
            printed = run_bash(block.code, name)
        elif block.kind == 'text':
            check_printed(block.code, printed, name)
        else:
            raise SystemExit(f'{name}: a block of {block.kind!r} is neither python, bash nor text')
        run += 1
    print(f'{page.name}: {run} blocks run')


if __name__ == '__main__':
    main()
