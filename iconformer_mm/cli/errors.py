"""A user's mistake ends a command with one line."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from iconformer_mm.engine.mistakes import explain


def user_errors(main: Callable[..., Any]) -> Callable[..., Any]:
    """Have a tool's ``main`` end with one line, without a traceback, where the user can mend what went wrong."""

    @functools.wraps(main)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return main(*args, **kwargs)
        except Exception as error:
            sentence = explain(error)
            if sentence is None:
                raise
            raise SystemExit(sentence) from None

    return run
