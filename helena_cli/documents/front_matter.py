"""The block at the head of a document, and the rest of it."""

import re
from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from helena_cli.documents import plain_yaml

#: What stands before and after a block of YAML: `---`, or `...` as some programs end it.
BOUNDARY = re.compile(r"^(?:-{3,}|\.{3})[ \t]*$", re.MULTILINE)

#: Without one of these at its beginning a text has no front matter.
_SIGNS = ("---", "+++", "{", "}")

_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


class FrontMatter(Struct, frozen=True):
    """What stands at the head of a document, and the rest of it."""

    #: JSON values only, without NUL, surrogates, NaN and infinity.
    fields: Mapping[str, Any]
    body: str
    #: What was wrong with it, None when nothing was.
    error: str | None = None


def split(text: str) -> FrontMatter:
    """Separate front matter and body; without usable front matter the body is the whole text."""
    text = text.strip()
    if not text.startswith(_SIGNS):
        return FrontMatter({}, text)
    if (usual := _usual(text)) is not None:
        return usual
    # The parsers take longer to import than to read hundreds of blocks; many runs need none.
    from helena_cli.documents import markup

    return markup.parse(text)


def _usual(text: str) -> FrontMatter | None:
    """What needs no parser of YAML; None when it does."""
    before, *parts = BOUNDARY.split(text, 2)
    fields = plain_yaml.read(parts[0]) if not before and len(parts) == 2 else None
    return None if fields is None else FrontMatter(fields, parts[1].strip())


def clean(text: str) -> str:
    """The text without the characters that PostgreSQL cannot store."""
    if text.isascii() and "\0" not in text:
        return text
    return _UNSTORABLE.sub("\ufffd", text)
