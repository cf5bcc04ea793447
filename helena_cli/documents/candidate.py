"""A file that may have changed, and what it turns out to be. Both travel between processes."""

from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from helena_cli.documents import scan
from helena_cli.documents.extract import Document, extract
from helena_cli.documents.scan import Found
from helena_cli.settings import DocumentSettings


class Root(Struct, frozen=True):
    """Where candidates lie."""

    namespace: str
    #: Absolute, without symbolic links.
    folder: str
    #: The folder as text that PostgreSQL accepts.
    key: str


class Candidate(Struct, frozen=True, gc=False):
    """A file that time stamps do not prove to be unchanged."""

    found: Found
    change: Literal["new", "changed"]
    #: The digest that makes it unchanged all the same.
    known: str | None = None


class Answer(Struct, frozen=True):
    """What became of a candidate: a document, unless there is a reason or nothing to say."""

    document: Document | None = None
    #: Bytes of the text that the document was made of.
    weight: int = 0
    unchanged: bool = False
    #: Why it could not be read.
    reason: str = ""


#: It vanished after it was listed. It may be on its way back: the next run judges.
VANISHED = Answer()


class Chunk(Struct):
    """Candidates of one root, and their answers once they are there."""

    root: Root
    candidates: Sequence[Candidate]
    answers: Sequence[Answer] | None = None


def answer(candidate: Candidate, root: Root, settings: DocumentSettings) -> Answer:
    """Read a candidate and make a document of it, if it has changed."""
    limit = settings.max_bytes
    try:
        source = scan.read(candidate.found, root.namespace, max_bytes=limit, inside=root.folder)
    except OSError as error:
        return Answer(reason=error.strerror or str(error))
    if source is None:
        return VANISHED
    if source.sha256 == candidate.known:
        return Answer(unchanged=True)
    return Answer(document=extract(source, settings), weight=len(source.content))
