"""The report of a real run, read in a real browser.

``tools/run_tests.sh`` installs Debian's Chromium where it can, and then says so in ``ICONFORMER_MM_BROWSER``.
"""

import html
import json
import os
import re
import shutil
import subprocess
import uuid

import cv2
import numpy as np
import pytest
from commands import scalars, tool
from conftest import ROOT
from tiny_runs import config

from iconformer_mm.engine import build_runner

NASTY = '</pre><script>document.title = "broken"</script><img src="http://127.0.0.1:9/x.png">'
BROWSER = os.environ.get('ICONFORMER_MM_BROWSER') or shutil.which('chromium')
in_browser = pytest.mark.skipif(
    BROWSER is None, reason='there is no chromium, and tools/run_tests.sh could not install it (Debian, as root)'
)
FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run']
FLAGS += ['--disable-background-networking', '--disable-component-update', '--disable-sync']
# Opens pages in frames of a phone's and a desktop's width, and writes what it measures into its own document.
HARNESS = """<!doctype html><title>wait</title><body><pre id="result"></pre><script>
async function measure([name, width]) {
  const frame = document.createElement('iframe');
  frame.style.cssText = `width: ${width}px; height: 900px; border: 0`;
  const loaded = new Promise(resolve => frame.onload = resolve);
  frame.src = name;
  document.body.append(frame);
  await loaded;
  const page = frame.contentDocument, root = page.documentElement, view = frame.contentWindow;
  for (const details of page.querySelectorAll('details')) details.open = true;
  return {
    title: page.title,
    sections: [...page.querySelectorAll('h2')].map(e => e.textContent),
    images: [...page.images].map(e => [e.alt, e.naturalWidth, e.naturalHeight]),
    scripts: page.scripts.length,
    requests: view.performance.getEntriesByType('resource').map(e => e.name).filter(e => !e.startsWith('data:')),
    width: view.innerWidth,
    room: root.clientWidth,
    needed: Math.max(root.scrollWidth, page.body.scrollWidth),
    config: page.querySelector('details pre')?.textContent,
    tables: [...page.querySelectorAll('table')].map(t => [...t.rows].map(r => [...r.cells].map(c => c.textContent))),
  };
}
Promise.all(PAGES.map(measure)).then(result => {
  document.getElementById('result').textContent = JSON.stringify(result);
});
</script></body>"""


def browse(folder, *pages):
    """Open pages of a folder by file://; what they are like at each width.

    Args:
        pages: File name and width in pixels of each.
    """
    (folder / 'harness.html').write_text(HARNESS.replace('PAGES', json.dumps(pages)))
    options = [f'--user-data-dir={folder / uuid.uuid4().hex}', '--allow-file-access-from-files']
    command = [BROWSER, *FLAGS, *options, '--virtual-time-budget=20000', '--dump-dom', f'file://{folder}/harness.html']
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    found = re.search(r'<pre id="result">(.+?)</pre>', result.stdout, re.DOTALL)
    assert found, result.stdout[-2000:] + result.stderr[-2000:]
    return json.loads(html.unescape(found.group(1)))


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """An adapted model's training with a nasty config, and pictures as tools/predict.py leaves them."""
    folder = tmp_path_factory.mktemp('run') / 'birds'
    changes = {'log_level': 'INFO', 'default_hooks.logger': dict(type='LoggerHook', interval=1), 'note': NASTY}
    cfg = config(folder, **changes)
    cfg.experiment_name = uuid.uuid4().hex
    build_runner(cfg).train()
    (folder / 'predictions').mkdir()
    for index in range(3):
        image = np.random.default_rng(index).integers(0, 256, (60, 90, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / 'predictions' / f'{index}.png'), image)
    return folder


@pytest.fixture(scope='module')
def report(run):
    output = tool('report.py', run)
    assert 'wrote' in output
    return run / 'report.html'


def test_the_page_is_whole_and_asks_for_nothing(report):
    text = report.read_text(encoding='utf-8')
    assert text.rstrip().endswith('</html>') and '<script' not in text
    addresses = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert addresses and all(address.startswith(('data:image/', '#')) for address in addresses)
    assert not re.search(r'url\(|@import|<link|<base', text)
    assert not list(report.parent.glob('.writing-*'))


@in_browser
def test_in_a_browser(run, report):
    (run / 'bad.html').write_text(f'<title>bad</title><p style="width: 400px">x</p>{NASTY}')
    phone, desktop, bad = browse(run, (report.name, 375), (report.name, 1280), ('bad.html', 375))
    # What the checks below are about is seen where it is.
    assert bad['title'] == 'broken' and bad['scripts'] == 1 and bad['needed'] > bad['room']
    assert bad['requests'] == ['http://127.0.0.1:9/x.png'] and bad['images'] == [['', 0, 0]]
    for page in (phone, desktop):
        assert page['title'] == next(run.glob('*.py')).stem
        assert page['sections'] == [
            *('Summary', 'Curves', 'Metrics', 'Predictions', 'Adapter', 'Files', 'Environment', 'Config')
        ]
        names = [alt for alt, *_ in page['images']]
        assert names[0] == 'training loss over iteration' and names[-1] == 'predictions/2.png' and len(names) == 6
        assert all(width > 0 and height > 0 for _, width, height in page['images'])
        assert page['images'][-1][1:] == [90, 60]
        assert page['scripts'] == 0 and page['requests'] == []
        assert NASTY in page['config']
        assert page['needed'] <= page['room']  # nothing to be scrolled to on the right
    assert phone['width'] == 375

    # The numbers are the run's own.
    tables = {table[0][0]: table for table in desktop['tables']}
    records = [line for line in scalars(run) if 'accuracy/top1' in line]
    assert len(records) == 2
    expected = [[str(r['step']), f'{r["accuracy/top1"]:.6g}'] for r in records]
    assert tables['epoch'] == [['epoch', 'accuracy/top1'], *expected]
    best = max(records, key=lambda r: r['accuracy/top1'])
    last = ['accuracy/top1', expected[-1][1], f'{best["accuracy/top1"]:.6g}', str(best['step'])]
    assert tables['metric'][1] == last
    parts = {row[0]: [int(cell.replace(',', '')) for cell in row[1:]] for row in tables['part'][1:]}
    d, c, head = 32, 8, 32 * 4 + 4
    assert parts['head'] == [head, 0, head]
    blocks = 2 * d * c + c + d + c * 9 * c + 2 * 9 * c
    # The filter of the last block is not trained: the head reads the class token alone.
    idle = c * 9 * c + 2 * 9 * c
    assert parts['adapters'] == [2 * blocks - idle, idle, 2 * blocks]
    assert parts['whole model'][0] == 2 * blocks - idle + head


@in_browser
def test_a_comparison_in_a_browser(tmp_path):
    tool('report.py', ROOT / 'benchmarks' / 'results' / 'peft', '--out', tmp_path / 'peft.html')
    phone, desktop = browse(tmp_path, ('peft.html', 375), ('peft.html', 1280))
    results = json.loads((ROOT / 'benchmarks' / 'results' / 'peft' / 'results.json').read_text())
    for page in (phone, desktop):
        assert page['title'] == results['title'] and page['sections'][:3] == ['Summary', 'Curves', 'Runs']
        assert all(width > 0 for _, width, _ in page['images']) and len(page['images']) == 2
        assert page['requests'] == [] and page['needed'] <= page['room']
    table = next(table for table in desktop['tables'] if table[0][:2] == ['method', 'task'])
    assert [row[:3] for row in table[1:]] == [[r['method'], r['task'], f'{r["mean"]:.6g}'] for r in results['rows']]


def test_mistakes(tmp_path):
    for folder, message in ((tmp_path / 'none', 'is no folder'), (tmp_path, 'is neither a work directory')):
        output = tool('report.py', folder, '--out', tmp_path / 'r.html', ok=False)
        assert message in output and 'Traceback' not in output
    assert not list(tmp_path.iterdir())
