"""Separates front matter and body, with the least that it takes to read the block."""

from helena_cli.documents import plain_yaml
from helena_cli.documents.block import BOUNDARY, FrontMatter

#: Without one of these at its beginning a text has no front matter.
_SIGNS = ("---", "+++", "{", "}")


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
