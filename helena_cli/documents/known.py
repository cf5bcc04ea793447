"""What is known of the documents of a namespace: the database, with what is queued laid over it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import msgspec
from msgspec import UNSET, Struct, UnsetType

from helena_cli.batch.operation import Operation
from helena_cli.documents.extract import TABLE
from helena_cli.documents.scan import Found

#: A file that was read within this time of a change may have changed again under the same time
#: stamps: those of some file systems are two seconds coarse. Nanoseconds.
SETTLED_NS = 2_000_000_000

#: es_doc_id, sha256, file_size; of the metadata modified_ns, changed_ns, read_ns and deleted_at.
Row = tuple[str, str | None, int | None, str | None, str | None, str | None, str | None]


class Registry(Protocol):
    """What the database knows about documents."""

    def roots(self, host: str) -> Sequence[tuple[str, str]]:
        """The (namespace, folder) that this host has claimed."""

    def claim(self, namespace: str, host: str, path: str, *, dry_run: bool = False) -> None:
        """Claim a namespace for a folder; raises NamespaceClaimed when it is another's."""

    def documents(self, namespace: str, doc_ids: Sequence[str] | None = None) -> Iterable[Row]:
        """The documents that were indexed under this namespace: these, or all."""

    def metadata(self, doc_ids: Sequence[str]) -> Iterable[tuple[str, str]]:
        """The metadata of these documents, as JSON."""

    def usage_rows(self, doc_ids: Sequence[str]) -> int:
        """How many rows of the usage log refer to these documents."""

    def delete(self, doc_ids: Sequence[str]) -> int:
        """Delete those of these documents that are still marked as missing; how many were."""


class Sink(Protocol):
    """Where operations go."""

    def extend(self, operations: Iterable[tuple[str, str, Mapping[str, Any]]]) -> Sequence[int]:
        """Accept operations, all or none; raises InvalidOperation, SpoolFull, SpoolUnavailable."""


class Queue(Sink, Protocol):
    """Where they wait too."""

    def queued(self, table: str) -> Iterator[Operation]:
        """What waits for one table, in order."""


class Knowledge(Protocol):
    """What is known of documents, wherever it was learnt."""

    def documents(self, namespace: str, doc_ids: Sequence[str] | None = None) -> "dict[str, Known]":
        """The documents of a namespace by es_doc_id: these, or all; the caller's own to change."""

    def metadata(self, doc_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The whole metadata of these documents."""


class Known(Struct, gc=False):
    """A document as it is in the database, or will be."""

    sha256: str | None = None
    size: int | None = None
    modified_ns: int = 0
    changed_ns: int = 0
    read_ns: int = 0
    deleted: bool = False

    def is_surely(self, found: Found) -> bool:
        """Whether the time stamps prove that the file is still what was read."""
        return (
            not self.deleted
            and found.size == self.size
            and found.modified_ns == self.modified_ns
            and found.changed_ns == self.changed_ns
            and max(found.modified_ns, found.changed_ns) + SETTLED_NS <= self.read_ns
        )


class _Metadata(Struct, gc=False):
    namespace: str | None = None
    modified_ns: int = 0
    changed_ns: int = 0
    read_ns: int = 0
    deleted_at: str | None = None


class _Queued(Struct, gc=False):
    """What a queued operation says of a document; UNSET where it says nothing."""

    es_doc_id: str
    sha256: str | UnsetType | None = UNSET
    file_size: int | UnsetType | None = UNSET
    metadata: _Metadata | UnsetType | None = UNSET


_decode_queued = msgspec.json.Decoder(_Queued).decode


class State:
    """What is known of some namespaces. The queue is read first: what leaves it meanwhile is then
    in the database, and seen there."""

    def __init__(self, registry: Registry, queue: Queue, namespaces: frozenset[str]) -> None:
        self._registry = registry
        self._queue = queue
        self._queued: dict[str, _Queued] = {}
        for _, said in _said(queue):
            if namespace_of(said.es_doc_id) in namespaces:
                earlier = self._queued.setdefault(said.es_doc_id, said)
                for column in ("sha256", "file_size", "metadata"):
                    if getattr(said, column) is not UNSET:
                        setattr(earlier, column, getattr(said, column))

    def documents(self, namespace: str, doc_ids: Sequence[str] | None = None) -> dict[str, Known]:
        """The documents of a namespace by es_doc_id: these, or all."""
        known = {}
        rows = self._registry.documents(namespace, doc_ids)
        for doc_id, sha256, size, modified, changed, read, deleted in rows:
            if namespace_of(doc_id) == namespace:
                known[doc_id] = Known(
                    sha256, size, _number(modified), _number(changed), _number(read), bool(deleted)
                )
        for doc_id in self._queued if doc_ids is None else self._queued.keys() & doc_ids:
            if namespace_of(doc_id) == namespace:
                _lay_over(known, self._queued[doc_id], namespace)
        return known

    def metadata(self, doc_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The whole metadata of these documents."""
        wanted = self._queued.keys() & doc_ids
        texts: dict[str, Any] = {}
        if wanted:
            for operation, said in _said(self._queue):
                if said.es_doc_id in wanted and isinstance(said.metadata, _Metadata):
                    texts[said.es_doc_id] = operation.columns()["metadata"]
        texts |= self._registry.metadata([i for i in doc_ids if i not in texts])
        return {doc_id: msgspec.json.decode(text) for doc_id, text in texts.items()}


def namespace_of(doc_id: str) -> str:
    """The namespace of an identifier: it holds no colon."""
    return doc_id.partition(":")[0]


def _said(queue: Queue) -> Iterator[tuple[Operation, _Queued]]:
    for operation in queue.queued(TABLE):
        if operation.kind == "message":
            continue
        try:
            said = _decode_queued(operation.data)
        except msgspec.ValidationError:
            # Somebody's operation without or with another kind of es_doc_id: no document of ours.
            continue
        yield operation, said


def _lay_over(known: dict[str, Known], said: _Queued, namespace: str) -> None:
    document = known.get(said.es_doc_id)
    metadata = said.metadata
    if isinstance(metadata, _Metadata) and metadata.namespace == namespace:
        document = document or known.setdefault(said.es_doc_id, Known())
        document.modified_ns = metadata.modified_ns
        document.changed_ns = metadata.changed_ns
        document.read_ns = metadata.read_ns
        document.deleted = metadata.deleted_at is not None
    elif metadata is not UNSET:
        # Somebody else's row from now on: to be indexed anew.
        known.pop(said.es_doc_id, None)
        return
    if document is None:
        return
    if said.sha256 is not UNSET:
        document.sha256 = said.sha256
    if said.file_size is not UNSET:
        document.size = said.file_size


def _number(text: str | None) -> int:
    """A time stamp as it was stored; what is none proves nothing."""
    return int(text) if text and text.isdecimal() else 0
