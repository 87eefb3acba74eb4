"""The documentation site builds without a warning, has the whole public API, and works in a browser."""

import functools
import importlib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, not_with_the_originals
from tool_parsers import parser_of_command

from iconformer_mm.cli.main import COMMANDS
from iconformer_mm.registry import PEFT_METHODS

pytestmark = not_with_the_originals
DOCS = ROOT / 'docs'
PACKAGES = sorted(
    path.parent.name
    for path in (ROOT / 'iconformer_mm').glob('*/__init__.py')
    if 'deprecation import moved' not in path.read_text(encoding='utf-8')
)
BROWSER = os.environ.get('ICONFORMER_MM_BROWSER') or shutil.which('chromium')
FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--window-size=1280,900']
FLAGS += ['--disable-background-networking', '--disable-component-update', '--disable-sync']
FLAGS += ['--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1']

# Uses the landing page as a reader would, and sends what it sees to the server.
HARNESS = """<!doctype html><iframe src="index.html" style="width: 1200px; height: 800px"></iframe><script>
const until = async test => {
  for (let i = 0; i < 200 && !test(); i++) await new Promise(resolve => setTimeout(resolve, 50));
};
onload = async () => {
  const view = document.querySelector('iframe').contentWindow, page = view.document;
  const shown = () => [...page.querySelectorAll('.tabbed-block')].filter(e => e.offsetParent).map(e => e.textContent);
  const scheme = () => page.body.getAttribute('data-md-color-scheme');
  const found = () => [...page.querySelectorAll('.md-search-result__link')].map(e => e.getAttribute('href'));
  const result = {first: shown(), before: scheme()};
  page.querySelectorAll('.tabbed-labels label')[2].click();
  await until(() => !result.first.includes(shown()[0]));
  result.third = shown();
  page.querySelector('form[data-md-component=palette] label:not([hidden])').click();
  await until(() => scheme() !== result.before);
  result.after = scheme();
  const query = page.querySelector('input[data-md-component=search-query]');
  query.focus();
  query.value = 'filter_norm';
  await until(() => { query.dispatchEvent(new view.Event('keyup', {bubbles: true})); return found().length; });
  result.found = found();
  const requests = view.performance.getEntriesByType('resource').map(e => e.name);
  result.elsewhere = requests.filter(e => !e.startsWith(location.origin));
  await fetch('/seen', {method: 'POST', body: JSON.stringify(result)});
};
</script>"""


class Server(ThreadingHTTPServer):
    """Serves the site and the harness to a browser, and keeps what the harness sends."""

    def __init__(self, site):
        self.seen = queue.Queue()
        super().__init__(('127.0.0.1', 0), functools.partial(Handler, directory=site))

    @property
    def address(self):
        return f'http://127.0.0.1:{self.server_port}/harness'


class Handler(SimpleHTTPRequestHandler):
    def do_GET(self):
        if self.path != '/harness':
            return super().do_GET()
        self.send_response(200)
        self.send_header('Content-Type', 'text/html')
        self.end_headers()
        self.wfile.write(HARNESS.encode())

    def do_POST(self):
        self.server.seen.put(json.loads(self.rfile.read(int(self.headers['Content-Length']))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """The built site. A link, an anchor or a name that is not there ends the build."""
    folder = tmp_path_factory.mktemp('site') / 'site'
    command = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', folder]
    env = {**os.environ, 'NO_MKDOCS_2_WARNING': '1'}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def text(path):
    return path.read_text(encoding='utf-8')


def tabs():
    """The code of the landing page's tabs by their titles."""
    found = re.findall(r'^=== "([^"]+)"\n(.+?)(?=^\S)', text(DOCS / 'index.md'), re.MULTILINE | re.DOTALL)
    return {title: re.search(r'```\w+\n(.*?)```', textwrap.dedent(body), re.DOTALL)[1] for title, body in found}


def test_every_package_has_a_page_of_the_reference():
    pages = {path.stem: text(path) for path in (DOCS / 'reference').glob('*.md')}
    assert [name for name in PACKAGES if f'::: iconformer_mm.{name}\n' not in pages.get(name, '')] == []


@pytest.mark.parametrize('package', ['index', *PACKAGES])
def test_public_names_are_in_the_reference(site, package):
    path = 'iconformer_mm' + (f'.{package}' if package != 'index' else '')
    page = text(site / 'reference' / (package if package != 'index' else '') / 'index.html')
    module = importlib.import_module(path)
    names = [
        name
        for name in getattr(module, '__all__', ())
        if not hasattr(getattr(module, name), '__path__') and name != '__version__'
    ]
    # A name may stand under the module that defines it.
    assert [name for name in names if not re.search(rf'id="{path}(\.\w+)*\.{name}"', page)] == []


def test_methods_are_in_the_reference():
    """The table has the names, classes and defaults of the code."""
    rows = re.findall(r'^\| `(.+?)` \| \[`.+?`\]\[(.+?)\] \| (.*?) \|$', text(DOCS / 'reference' / 'methods.md'), re.M)
    expected = []
    for name, method in sorted(PEFT_METHODS.module_dict.items()):
        cells = '| |'
        if hasattr(method, 'default_input'):
            adapter = method.adapter_class.__name__
            sites = ', '.join(f'`{site}`' for site in method.default_sites)
            cells = f'[`{adapter}`][iconformer_mm.adapters.{adapter}] | `{method.default_input}` | {sites}'
        expected.append((name, f'{method.__module__}.{method.__name__}', cells))
    assert rows == expected


def test_commands_are_in_the_reference():
    rows = re.findall(r'^\| `iconformer (.+?)` \| (.+) \|$', text(DOCS / 'reference' / 'cli.md'), re.MULTILINE)
    assert {name: what.replace('`', '') for name, what in rows} == {name: what for name, (_, what) in COMMANDS.items()}


def test_search_finds_functions_and_prose(site):
    entries = json.loads(text(site / 'search' / 'search_index.json'))['docs']
    places = {entry['location'] for entry in entries}
    assert 'reference/ops/#iconformer_mm.ops.dynamic_depthwise_conv2d' in places and 'troubleshooting/' in places


def test_versions_and_dark_mode(site):
    page = text(site / 'index.html')
    settings = json.loads(re.search(r'<script id="__config" type="application/json">(.*?)</script>', page)[1])
    assert settings['version'] == {'provider': 'mike', 'default': 'latest'}
    assert re.findall(r'data-md-color-scheme="(\w+)"', page)[-2:] == ['default', 'slate']


def test_links_out_of_the_docs_lead_to_the_repository(site):
    repository = re.search(r'^repo_url: (\S+)$', text(ROOT / 'mkdocs.yml'), re.MULTILINE)[1]
    page = unescape(text(site / 'install' / 'index.html'))
    assert f'href="{repository}/blob/main/iconformer_mm/compat.py"' in page
    assert 'href="../../' not in page


def test_a_link_to_nothing_is_an_error():
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location('site_links', DOCS / 'site_links.py')
    hook = module_from_spec(spec)
    spec.loader.exec_module(hook)
    page = SimpleNamespace(file=SimpleNamespace(src_uri='reference/ops.md'))
    config = dict(docs_dir=str(DOCS), repo_url='https://example.com/r')

    def rewrite(markdown):
        return hook.on_page_markdown(markdown, page, config)

    assert rewrite('[a](../../configs) [b](../../README.md#top)') == (
        '[a](https://example.com/r/tree/main/configs) [b](https://example.com/r/blob/main/README.md#top)'
    )
    assert rewrite('[a](../README.md)') == '[a](https://example.com/r/blob/main/docs/README.md)'
    assert rewrite('[a](../methods.md#x) [b](ops.md)') == '[a](../methods.md#x) [b](ops.md)'
    with pytest.raises(FileNotFoundError, match=r'reference/ops.md links to ../../none.py, which is not there'):
        rewrite('[a](../../none.py)')


def test_three_ways_in(tmp_path, monkeypatch):
    """The code of the tabs runs; only the download is left out."""
    from iconformer_mm.engine import load_config

    monkeypatch.chdir(tmp_path)
    code = tabs()
    assert list(code) == ['One flag', 'A config', 'Python']
    words = code['One flag'].split()
    assert words[:2] == ['iconformer', 'train']
    parser_of_command('train').parse_args(words[2:])
    assert load_config(words[2], words[4]).default_hooks.peft.type == 'PEFTHook'
    (tmp_path / 'config.py').write_text(code['A config'])
    assert load_config('config.py').custom_hooks[0].method.bottleneck == 64
    exec(code['Python'].replace('pretrained=True', 'pretrained=False'), dict(torch=torch))
    assert (tmp_path / 'adapter.safetensors').is_file()


@pytest.mark.skipif(BROWSER is None, reason='there is no chromium')
def test_in_a_browser(site, tmp_path):
    """Search finds, a tab opens, dark mode is switched on; only the repository's stars come from elsewhere."""
    with Server(site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [BROWSER, *FLAGS, f'--user-data-dir={tmp_path}', '--remote-debugging-port=0', server.address]
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            seen = server.seen.get(timeout=90)
        finally:
            browser.terminate()
            browser.wait()
            server.shutdown()
    assert any('filter_norm' in link for link in seen['found'])
    assert len(seen['first']) == 1 and '--peft icon' in seen['first'][0]
    assert len(seen['third']) == 1 and 'timm.create_model' in seen['third'][0]
    assert {seen['before'], seen['after']} == {'default', 'slate'}
    assert all(address.startswith('https://api.github.com/repos/') for address in seen['elsewhere'])
