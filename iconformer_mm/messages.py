"""What messages to the user are made of."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def hint(word: str, words: Iterable[str], cutoff: float = 0.6) -> str:
    """The name that was probably meant, as what follows in a sentence; empty if none is near.

    Args:
        word: What was written.
        words: What there is.
        cutoff: How near, from 0 to 1. Defaults to 0.6.
    """
    near = difflib.get_close_matches(word, [str(w) for w in words], n=1, cutoff=cutoff)
    return f" (did you mean '{near[0]}'?)" if near else ''


def one_line(error: BaseException | str) -> str:
    """A message on one line, which any terminal can print."""
    text = str(error)
    if isinstance(error, KeyError) and error.args:  # str() would put it into quotation marks
        text = str(error.args[0])
    text = ' '.join(text.split()) or type(error).__name__
    return text.encode('utf-8', 'backslashreplace').decode('utf-8')
