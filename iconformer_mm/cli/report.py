"""Write one HTML page about a training run or a comparison, from its folder.

python tools/report.py work_dirs/NAME
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from iconformer_mm.extras import require_extra
from iconformer_mm.files import written_whole
from iconformer_mm.reports.comparison_page import report_comparison
from iconformer_mm.reports.report_page import MIB, ReportError, render_page
from iconformer_mm.reports.run_report import report_run

from .errors import user_errors
from .parser import Parser


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__.partition('\n')[0])
    parser.add_argument('work_dir', type=Path, help='work directory of tools/train.py, or --out of tools/compare.py')
    parser.add_argument('--out', type=Path, help='HTML file to write (WORK_DIR/report.html)')
    parser.add_argument('--max-mib', type=float, default=8.0, help='size of pictures of predictions in all (8)')
    return parser.parse_args(argv)


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = parse_args(argv)
    require_extra('report', 'a report')
    folder, out = args.work_dir, args.out or args.work_dir / 'report.html'
    if not folder.is_dir():
        raise SystemExit(f'error: {folder} is no folder')
    try:
        if (folder / 'results.json').is_file():
            page = report_comparison(folder)
        else:
            page = report_run(folder, int(args.max_mib * MIB))
        with written_whole(out) as temporary:
            temporary.write_text(render_page(page), encoding='utf-8')
    except (ReportError, OSError) as error:
        raise SystemExit(f'error: {error}') from None
    print(f'wrote {out} ({out.stat().st_size / MIB:.2f} MiB)')
