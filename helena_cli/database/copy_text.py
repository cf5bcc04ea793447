"""Values of the spool, which are JSON, as the text format of COPY.

Each becomes the text from which COPY reads the very value that `json_to_recordset` would give to a
column of that type; where that is not certain there is no text. Nearly all of them are cut out of
the JSON as they are: what COPY would take for a delimiter JSON has escaped already. Between values
JSON may have such space too, but Helena writes none; whoever sends the lines looks at the number of
rows that came of them.
"""

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter

import msgspec
from msgspec import Raw

from helena_cli.batch.reading import Values
from helena_cli.batch.table import Column

#: An array in PostgreSQL's spelling.
_BRACES = bytes.maketrans(b"[]", b"{}")

_decode_text = msgspec.json.Decoder(str).decode
_decode_list = msgspec.json.Decoder(list[Raw]).decode


class _NoText(Exception):
    """It is not certain which text means this value: let the server read the JSON."""


class CopyText:
    """The lines of one set of columns; `names` are in the order of their fields."""

    def __init__(self, columns: Sequence[Column]) -> None:
        """Only of columns that can be `copied_as` something."""
        scalars = [c.name for c in columns if c.copied_as == "scalar"]
        # Of two names or more it gets a tuple.
        self._scalars = itemgetter(*scalars) if len(scalars) > 1 else None
        self._others: list[tuple[str, Callable[[list[Raw]], list[bytes]]]] = [
            (c.name, _CONVERT[c.copied_as])
            for c in columns
            if c.copied_as is not None and (c.copied_as != "scalar" or not self._scalars)
        ]
        self.names = [*(scalars if self._scalars else ()), *(name for name, _ in self._others)]

    def lines(self, rows: Sequence[Values]) -> Sequence[bytes | None]:
        """A line for each row, None when one of its values has no text.

        To look through many rows at once costs a fraction of looking through each.
        """
        try:
            return self._lines(rows)
        except (_NoText, msgspec.DecodeError, UnicodeDecodeError):
            if len(rows) < 2:
                return [None] * len(rows)
        middle = len(rows) // 2
        return [*self.lines(rows[:middle]), *self.lines(rows[middle:])]

    def _lines(self, rows: Sequence[Values]) -> list[bytes]:
        fields = []
        if self._scalars:
            fields.append(_scalars([b"\t".join(self._scalars(row)) for row in rows]))
        for name, convert in self._others:
            fields.append(convert([row[name] for row in rows]))
        if any(len(field) != len(rows) for field in fields):
            # Space between values was taken for the end of a row.
            raise _NoText
        return [b"\t".join(line) + b"\n" for line in zip(*fields, strict=True)]


def _scalars(rows: Sequence[bytes]) -> list[bytes]:
    """Fields of many rows: in strings and numbers without an escape quotes only delimit."""
    text = b"\t%b\t" % b"\t\n\t".join(rows)
    if b"\\" in text or b"{" in text or b"[" in text:
        if len(rows) == 1:
            # A tab within an object comes back when its parts are joined.
            return [b"\t".join(map(_scalar, rows[0].split(b"\t")))]
        return [_scalars([row])[0] for row in rows]
    if b"\tnull\t" in text:
        # Twice, for two in a row share a tab.
        text = text.replace(b"\tnull\t", b"\t\\N\t").replace(b"\tnull\t", b"\t\\N\t")
    return text.replace(b'"', b"")[1:-1].split(b"\t\n\t")


def _single_scalars(values: list[Raw]) -> list[bytes]:
    return _scalars([bytes(value) for value in values])


def _documents(values: list[Raw]) -> list[bytes]:
    text = b"\n".join(values)
    if b"\\" in text or b"null" in text:
        return [_document(bytes(value)) for value in values]
    return text.split(b"\n")


def _arrays(values: list[Raw]) -> list[bytes]:
    text = b"\n".join(values)
    count = len(values)
    # Each is one array, and there is no other bracket, not even in a string.
    if (
        (text.count(b"\n["), text.count(b"["), text.count(b"]")) == (count - 1, count, count)
        and text.startswith(b"[")
        and b"\\" not in text
        and b"{" not in text
    ):
        return text.translate(_BRACES).split(b"\n")
    return [_array(bytes(value)) for value in values]


def _scalar(value: bytes) -> bytes:
    """The text between the quotes, or a number, true, false or even an object as it stands."""
    if value[:1] != b'"':
        return _document(value)
    return value[1:-1] if b"\\" not in value else _escape(_decode_text(value).encode())


def _document(value: bytes) -> bytes:
    """For json and jsonb: the JSON itself."""
    if b"\\" not in value:
        return b"\\N" if value == b"null" else value
    if value[:1] == b'"':
        # The server reads a text and writes it anew, and this is how it does.
        value = msgspec.json.encode(_decode_text(value))
    return value.replace(b"\\", b"\\\\")


def _array(value: bytes) -> bytes:
    """An array of scalars: quoted strings and bare numbers are elements for PostgreSQL too."""
    if value.rfind(b"[") == 0 and b"\\" not in value and b"{" not in value:
        return b"{%b}" % value[1:-1]
    if value.startswith(b"["):
        return _escape(b"{%b}" % b",".join(map(_element, _decode_list(value))))
    if value.startswith(b"{"):
        # An empty object would be an empty array.
        raise _NoText
    return _scalar(value)


def _element(raw: Raw) -> bytes:
    value = bytes(raw)
    if value[:1] in (b"[", b"{"):
        raise _NoText
    if value[:1] != b'"':
        return value
    text = _decode_text(value).encode()
    return b'"%b"' % text.replace(b"\\", b"\\\\").replace(b'"', b'\\"')


def _escape(text: bytes) -> bytes:
    text = text.replace(b"\\", b"\\\\").replace(b"\t", b"\\t")
    return text.replace(b"\n", b"\\n").replace(b"\r", b"\\r")


#: The values of a column in many rows become fields.
_CONVERT: Mapping[str, Callable[[list[Raw]], list[bytes]]] = {
    "scalar": _single_scalars,
    "json": _documents,
    "array": _arrays,
}
