"""Packages that only some commands need, and the extras that install them."""

from __future__ import annotations

from importlib.util import find_spec

# Import names by the extra of pyproject.toml that installs them.
EXTRAS = {
    'det': ('pycocotools',),
    'text': ('transformers',),
    'cpu': ('numba',),
    'plot': ('matplotlib',),
    'report': ('matplotlib', 'jinja2', 'markdown_it'),
    'analysis': ('matplotlib', 'sklearn'),
    'onnx': ('onnx',),
    'quant': ('torchao',),
    'quickstart': ('matplotlib', 'sklearn'),
    'ray': ('ray', 'fastapi', 'prometheus_client'),
}


class MissingExtraError(ImportError):
    """A package of an extra is not installed."""


def require_extra(extra: str, purpose: str) -> None:
    """Check that the packages of an extra are installed, without importing them.

    Call it before what takes time, and before the imports themselves.

    Args:
        extra: Name of the extra, one of ``EXTRAS``.
        purpose: What needs them, to begin the message with.

    Raises:
        MissingExtraError: One is not installed. The message names it and the command that installs it.
    """
    missing = [package for package in EXTRAS[extra] if find_spec(package) is None]
    if missing:
        verb = 'is' if len(missing) == 1 else 'are'
        raise MissingExtraError(
            f"{purpose} needs {' and '.join(missing)}, which {verb} not installed; install the extra '{extra}': "
            f"pip install 'iconformer_mm[{extra}]'"
        )
