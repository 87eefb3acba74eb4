"""An extension of Griffe, which reads the docstrings for the site: roles such as ``:func:`` become links."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r':(?:attr|class|data|exc|func|meth|mod):`~?([^`]+)`')


class Roles(griffe.Extension):
    """Rewrites the roles of Sphinx, which MkDocs does not know."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(_link, obj.docstring.value)


def _link(role: re.Match) -> str:
    # Optional: a name that the site does not have, such as one of another package, stays text.
    return f'<autoref optional identifier="{role[1]}"><code>{role[1]}</code></autoref>'
