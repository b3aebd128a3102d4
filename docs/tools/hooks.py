"""What mkdocs does to a page: links to files of the repository, which the site does not have, become their paths."""

import os
import re
from typing import Any

__all__ = ["on_page_markdown"]


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs for each page.

    :param page: mkdocs's
    """

    def replace(match: re.Match[str]) -> str:
        target = os.path.normpath(os.path.join("docs", os.path.dirname(page.file.src_uri), match[2]))
        return match[0] if target.startswith("docs" + os.sep) else f"`{target}`"

    return re.sub(r"\[([^\]]*)\]\((\.\./[^)#]*)\)", replace, markdown)
