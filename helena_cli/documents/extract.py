"""One file becomes one row: pure, picklable, and whatever the file holds.

No document vanishes. Broken front matter, a wrong encoding or a binary file still gives a row; what
was wrong stands in `metadata.extraction_error`.
"""

import codecs
import hashlib
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from msgspec import Struct

from helena_cli.documents import front_matter
from helena_cli.documents.block import FrontMatter, clean
from helena_cli.documents.rules import CLASSIFICATIONS, Classifier, compile_rules
from helena_cli.settings import DocumentSettings

TABLE = "es_document_references"

#: Of a longer file only this much is read as text. Bytes.
TEXT_BYTES = 1024 * 1024

#: PostgreSQL's B-trees take keys of up to 2,704 bytes; identifiers beyond this one are shortened.
_ID_BYTES = 1400
#: Values in columns that the tables of Helena index. Characters.
_VALUE_CHARS = 500
_TAG_CHARS = 200
_TITLE_CHARS = 1000
_URL_CHARS = 2000
_MAX_TAGS = 100
_MAX_LINKS = 100

_UTF8_BOM = codecs.BOM_UTF8
#: UTF-32 first: its little-endian mark begins with that of UTF-16.
_BOMS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\f\r\x1b"))
#: Of ASCII: a space for what separates words, an x for all else.
_MARKS = bytes(ord(" " if chr(code).isspace() else "x") for code in range(256))

#: A code fence, a heading after hashes, or a heading underlined with equals signs.
_HEADING = re.compile(
    r"^ {0,3}(?:(?P<fence>`{3,}|~{3,})|#{1,6}[ \t]+(?P<hashed>[^\n]+)"
    r"|(?P<underlined>[^\s#>`~=|-][^\n]*)\n=+[ \t]*$)",
    re.MULTILINE,
)
#: Linear in time: what a target may hold excludes what it starts with.
_LINKS = (
    ("](", re.compile(r"\]\([ \t]*<?([^()\s<>]{1,2000})")),
    ("[[", re.compile(r"\[\[([^\[\]\n|#]{1,2000})")),
    ("<http", re.compile(r"<(https?://[^<>\s]{1,2000})>")),
)


class Source(Struct, frozen=True):
    """A file as it was read."""

    namespace: str
    #: Relative to the root, with slashes, escaped so that it is valid text.
    path: str
    #: All of it, or its first `TEXT_BYTES`.
    content: bytes
    size: int
    sha256: str
    modified_ns: int
    changed_ns: int
    #: Unix time in nanoseconds just before the file was read.
    read_ns: int


class Document(Struct, frozen=True):
    """A row for `es_document_references`, and what was wrong with the file."""

    doc_id: str
    title: str
    row: Mapping[str, Any]
    error: str | None = None


def document_id(namespace: str, path: str) -> str:
    """`namespace:path`, the stable key of a document; a very long one ends with its digest."""
    identifier = f"{namespace}:{path}"
    if len(identifier) * 4 > _ID_BYTES:
        encoded = identifier.encode()
        if len(encoded) > _ID_BYTES:
            # Still longer than any identifier that is kept whole, so the two kinds cannot meet.
            digest = hashlib.sha256(encoded).hexdigest()[:32]
            return f"{encoded[:_ID_BYTES].decode(errors='ignore')}~{digest}"
    return identifier


def extract(source: Source, settings: DocumentSettings) -> Document:
    """Make the row of a document. Never fails because of what the file holds."""
    text, problem = _text(source, settings.max_bytes)
    matter = front_matter.split(text)
    lowered = text.lower()
    fields = {key.lower(): value for key, value in matter.fields.items()}
    rules = compile_rules(settings.rules)
    name = source.path.rpartition("/")[2]
    title = _title(fields, matter.body, name)
    classification, doubt = _classification(fields, rules, source.path)
    error = "; ".join(part for part in (problem, matter.error, doubt) if part) or None
    metadata = _metadata(source, text, matter, settings.preview_chars)
    metadata["title"] = title
    if error:
        metadata["extraction_error"] = error
    doc_id = document_id(source.namespace, source.path)
    row = {
        "es_index": settings.index,
        "es_doc_id": doc_id,
        "doc_type": rules.doc_type(name.lower(), lowered),
        "issuer": _scalar(fields, "issuer", "author"),
        "report_url": _scalar(fields, "report_url", "url", limit=_URL_CHARS),
        "filename": name,
        "file_size": source.size,
        "sha256": source.sha256,
        "indexed_at": _time(source.read_ns),
        "data_classification": classification,
        "investigation_id": _scalar(fields, "investigation", "investigation_id")
        or rules.investigation(source.path),
        "tags": _tags(fields, rules.tags(lowered)),
        "metadata": metadata,
    }
    return Document(doc_id=doc_id, title=title, row=row, error=error)


def _time(nanoseconds: int) -> str:
    """In UTC, as text: a row of nothing but plain values is queued in half of the time."""
    at = datetime.fromtimestamp(nanoseconds / 1e9, UTC)
    return f"{at.replace(tzinfo=None).isoformat()}Z"


def _metadata(source: Source, text: str, matter: FrontMatter, preview_chars: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "namespace": source.namespace,
        "path": source.path,
        "preview": matter.body[:preview_chars],
        "line_count": text.count("\n") + (not text.endswith("\n") if text else 0),
        "word_count": _word_count(matter.body),
        "links": _links(matter.body),
        "front_matter": matter.fields,
        "modified_ns": source.modified_ns,
        "changed_ns": source.changed_ns,
        "read_ns": source.read_ns,
    }
    if len(source.content) < source.size:
        metadata["analysed_bytes"] = len(source.content) if text else 0
    return metadata


def _word_count(text: str) -> int:
    """What `split` finds; without making the words it takes a third of the time."""
    if not text.isascii():
        return len(text.split())
    marks = text.encode().translate(_MARKS)
    return marks.count(b" x") + marks.startswith(b"x")


def _text(source: Source, max_bytes: int) -> tuple[str, str | None]:
    """The file as text with plain newlines, and what was wrong with it."""
    if source.size > max_bytes:
        return "", f"larger than max_bytes ({max_bytes:,} bytes): not read as text"
    text, problem = _decode(source.content, complete=len(source.content) == source.size)
    if "\0" in text:
        problem = "; ".join(filter(None, (problem, "it contains NUL characters")))
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return clean(text), problem


def _decode(content: bytes, *, complete: bool) -> tuple[str, str | None]:
    """UTF-8, what a byte order mark says, or Windows-1252; a cut-off last character is no error."""
    for bom, codec in _BOMS:
        if content.startswith(bom):
            return _decode_marked(content, codec, complete=complete)
    if b"\0" in content and _is_binary(content):
        return "", "a binary file"
    try:
        return codecs.utf_8_decode(content.removeprefix(_UTF8_BOM), "strict", complete)[0], None
    except UnicodeDecodeError as error:
        if b"\0" in content or _is_binary(content):
            return "", "a binary file"
        at = error.start
    try:
        return content.decode("cp1252"), f"not UTF-8 (byte {at:,}), read as Windows-1252"
    except UnicodeDecodeError:
        return content.decode("latin-1"), f"not UTF-8 (byte {at:,}), read as Latin-1"


def _decode_marked(content: bytes, codec: str, *, complete: bool) -> tuple[str, str | None]:
    decoder = codecs.getincrementaldecoder(codec)
    try:
        return decoder("strict").decode(content, complete), None
    except UnicodeDecodeError:
        return decoder("replace").decode(content, complete), f"broken {codec.upper()}"


def _is_binary(content: bytes) -> bool:
    """More than a tenth of control characters."""
    return len(content) - len(content.translate(None, _CONTROLS)) > len(content) / 10


def _title(fields: Mapping[str, Any], body: str, name: str) -> str:
    """What the front matter says, else the first heading, else the file's name."""
    title = _scalar(fields, "title", limit=_TITLE_CHARS) or _heading(body)[:_TITLE_CHARS]
    return " ".join(title.split()) or name.rpartition(".")[0] or name


def _heading(body: str) -> str:
    """The first heading outside of code blocks, "" without one."""
    fence = ""
    for match in _HEADING.finditer(body):
        mark = match["fence"]
        if mark:
            if not fence:
                fence = mark
            elif mark.startswith(fence):
                fence = ""
        elif not fence:
            title = (match["hashed"] or match["underlined"]).strip()
            bare = title.rstrip("#")
            if not bare or bare[-1] in " \t":
                title = bare.rstrip()
            if title:
                return title
    return ""


def _links(body: str) -> list[str]:
    """The targets of links, pages and addresses, each once."""
    links: dict[str, None] = {}
    for sign, pattern in _LINKS:
        # A single character is found much faster.
        if sign[0] in body and sign in body:
            links.update(dict.fromkeys(pattern.findall(body)))
    return [link.strip() for link in islice(links, _MAX_LINKS)]


def _scalar(fields: Mapping[str, Any], *names: str, limit: int = _VALUE_CHARS) -> str | None:
    """The first of these fields that holds text, a number or a list of them, as text."""
    for name in names:
        value = fields.get(name)
        if value is not None:
            text = ", ".join(_words(_as_list(value)))[:limit].strip()
            if text:
                return text
    return None


def _words(values: list[Any]) -> Iterator[str]:
    """Texts and numbers; a boolean is a word that YAML took for one, and which is not known."""
    for value in values:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            text = str(value).strip()
            if text:
                yield text


def _classification(
    fields: Mapping[str, Any], rules: Classifier, path: str
) -> tuple[str, str | None]:
    """What the document says of itself, else what the rules say; an unknown word is a doubt."""
    said = _scalar(fields, "classification", "data_classification")
    if said is None:
        return rules.classification(path), None
    if said.lower() in CLASSIFICATIONS:
        return said.lower(), None
    fallback = rules.classification(path)
    return fallback, f"unknown classification {said[:50]!r}, taken as {fallback}"


def _tags(fields: Mapping[str, Any], by_rule: list[str]) -> list[str]:
    """The document's own tags, then those of the rules, each once."""
    own = fields.get("tags")
    if isinstance(own, str):
        own = own.split(",") if "," in own else own.split()
    words = (word.lstrip("#").strip()[:_TAG_CHARS] for word in _words(_as_list(own)))
    tags = dict.fromkeys(word for word in words if word)
    return list(dict.fromkeys([*list(tags)[:_MAX_TAGS], *by_rule]))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
