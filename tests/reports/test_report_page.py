import base64
import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from iconformer_mm.reports.report_page import Page, Section, Table, format_value, read_picture, render_page

NASTY = '</pre></td></style><script>alert("x")</script> & \' {{ 7 * 7 }} ünï'


class Reader(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data)


def test_all_texts_are_escaped(tmp_path):
    path = tmp_path / 'p.png'
    cv2.imwrite(str(path), np.zeros((4, 5, 3), np.uint8))
    section = Section(
        title=NASTY,
        notes=[NASTY],
        facts={NASTY: NASTY},
        tables=[Table([NASTY, NASTY], [[NASTY, NASTY]])],
        pictures=[read_picture(path, NASTY, captioned=True)],
        folded={NASTY: NASTY},
    )
    plain = Section('x', ['x'], {'x': 'x'}, [Table(['x', 'x'], [['x', 'x']])], folded={'x': 'x'})
    plain.pictures = [read_picture(path, 'x', captioned=True)]
    page, expected = (Reader(render_page(Page(t, t, [s]))) for t, s in ((NASTY, section), ('x', plain)))
    assert page.tags == expected.tags and 'script' not in page.tags
    # Title, heading, subtitle, the section's title twice, a note, two facts, four cells, a caption, two folded.
    assert [text for text in page.texts if text == NASTY] == [NASTY] * 15
    assert ('alt', NASTY) in page.attributes


def test_pictures_are_in_the_page_and_damaged_ones_are_none(tmp_path):
    path = tmp_path / 'p.png'
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    page = render_page(Page('t', 's', [Section('p', pictures=[read_picture(path, 'c')])]))
    (content,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(content) == path.read_bytes()
    path.write_bytes(path.read_bytes()[:-2000])
    assert read_picture(path, 'c') is None
    path.write_text('no picture')
    assert read_picture(path, 'c') is None
    assert read_picture(tmp_path / 'none.png', 'c') is None


@pytest.mark.parametrize(
    ('value', 'text'),
    [(None, '–'), (1234567, '1,234,567'), (0.12345678, '0.123457'), (float('nan'), 'nan'), ('a', 'a'), (True, 'True')],
)
def test_values(value, text):
    assert format_value(value) == text
