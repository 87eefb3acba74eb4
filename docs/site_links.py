"""A hook of MkDocs: links that the site does not have lead to the repository.

The pages are read in the checkout and on the site. In the checkout ``../configs`` is a folder, and ``docs/README.md``
the index; the site has neither.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

BRANCH = 'main'
LINK = re.compile(r'(?<=\]\()(?P<path>\.\./[^)\s#]*|README\.md)(?P<anchor>#[^)\s]*)?(?=[)\s])')


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Rewrite the links of a page.

    Args:
        markdown: The page's text.
        page: The page.
        config: The site's settings.

    Raises:
        FileNotFoundError: A link leads to a file that the checkout does not have.
    """
    docs = Path(config['docs_dir']).resolve()
    source = docs / page.file.src_uri

    def to_repository(link: re.Match) -> str:
        target = (source.parent / link['path']).resolve()
        if target.is_relative_to(docs) and target != docs / 'README.md':
            return link[0]
        if not target.exists():
            raise FileNotFoundError(f'{page.file.src_uri} links to {link["path"]}, which is not there')
        view = 'tree' if target.is_dir() else 'blob'
        path = target.relative_to(docs.parent).as_posix()
        return f'{config["repo_url"]}/{view}/{BRANCH}/{path}{link["anchor"] or ""}'

    return LINK.sub(to_repository, markdown)
