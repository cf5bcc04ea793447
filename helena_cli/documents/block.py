"""What front matter is, whoever reads it: the block at the head of a document, and its fields."""

import re
from collections.abc import Mapping
from typing import Any

from msgspec import Struct

#: What stands before and after a block of YAML: `---`, or `...` as some programs end it.
BOUNDARY = re.compile(r"^(?:-{3,}|\.{3})[ \t]*$", re.MULTILINE)

_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


class FrontMatter(Struct, frozen=True):
    """What stands at the head of a document, and the rest of it."""

    #: JSON values only, without NUL, surrogates, NaN and infinity.
    fields: Mapping[str, Any]
    body: str
    #: What was wrong with it, None when nothing was.
    error: str | None = None


def clean(text: str) -> str:
    """The text without the characters that PostgreSQL cannot store."""
    if text.isascii() and "\0" not in text:
        return text
    return _UNSTORABLE.sub("\ufffd", text)
