"""What is known of the documents, kept in memory while their folders are watched.

A save then costs the database nothing but its row, and watching goes on when the database is away.
It is read from there once, and again at each rescan: what others change meanwhile is seen then.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from helena_cli.documents.extract import TABLE
from helena_cli.documents.known import Known, Queue, Registry, State, namespace_of
from helena_cli.documents.roots import Target
from helena_cli.documents.watch_state import DocumentChange
from helena_cli.errors import HelenaError

#: How many documents `changes` remembers.
LAST = 50

#: After a failed connection none is tried for so many seconds.
PAUSE = 2.0

Connect = Callable[[], AbstractContextManager[Registry]]


class Memory:
    """What is known, and the way of operations into the queue, which adds to it."""

    def __init__(self, queue: Queue, connect: Connect) -> None:
        """`connect` opens the database; it may raise any HelenaError."""
        self._queue = queue
        self._connect = connect
        self._documents: dict[str, dict[str, Known]] = {}
        self._folders: dict[str, str] = {}
        self._stack = ExitStack()
        self._registry: Registry | None = None
        self._refused: HelenaError | None = None
        self._refused_until = 0.0
        #: The last documents that were queued, newest first.
        self.changes: deque[DocumentChange] = deque(maxlen=LAST)

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Whatever the block asks of the database is asked over one connection, if anything is."""
        try:
            yield
        finally:
            self._registry = None
            self._stack.close()

    def registry(self) -> Registry:
        """The database, within `connected`. Raises HelenaError, at once if it has just failed."""
        if self._registry is None:
            if self._refused is not None and time.monotonic() < self._refused_until:
                raise self._refused
            try:
                self._registry = self._stack.enter_context(self._connect())
            except HelenaError as error:
                self._refused, self._refused_until = error, time.monotonic() + PAUSE
                raise
            self._refused = None
        return self._registry

    def load(self, targets: Sequence[Target]) -> None:
        """Read what is known of these roots, within `connected`. Raises HelenaError."""
        folders = {target.namespace: target.key for target in targets}
        state = State(self.registry(), self._queue, frozenset(folders))
        self._documents = {namespace: state.documents(namespace) for namespace in folders}
        self._folders = folders

    def documents(self, namespace: str, doc_ids: Sequence[str] | None = None) -> dict[str, Known]:
        """The documents of a namespace by es_doc_id: these, or all."""
        known = self._documents[namespace]
        if doc_ids is None:
            return dict(known)
        return {doc_id: known[doc_id] for doc_id in doc_ids if doc_id in known}

    def metadata(self, doc_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The whole metadata of these documents: it is not kept, the database is asked."""
        namespaces = frozenset(map(namespace_of, doc_ids))
        return State(self.registry(), self._queue, namespaces).metadata(doc_ids)

    def extend(self, operations: Iterable[tuple[str, str, Mapping[str, Any]]]) -> Sequence[int]:
        """Queue operations, and remember what they say of documents."""
        operations = list(operations)
        ids = self._queue.extend(operations)
        for _, table, row in operations:
            if table == TABLE:
                self._note(row)
        return ids

    def failed(self, path: str) -> None:
        """Remember a document that could not be queued."""
        self.changes.appendleft(DocumentChange(time.time(), path, "failed"))

    def _note(self, row: Mapping[str, Any]) -> None:
        doc_id, metadata = str(row["es_doc_id"]), row["metadata"]
        namespace = namespace_of(doc_id)
        known = self._documents[namespace]
        earlier = known.get(doc_id)
        path = f"{self._folders[namespace]}/{metadata['path']}"
        now = time.time()
        if "deleted_at" in metadata:
            if earlier is not None:
                earlier.deleted = True
            self.changes.appendleft(DocumentChange(now, path, "missing"))
            return
        known[doc_id] = Known(
            row["sha256"],
            row["file_size"],
            metadata["modified_ns"],
            metadata["changed_ns"],
            metadata["read_ns"],
        )
        change = DocumentChange(now, path, "new" if earlier is None else "changed")
        self.changes.appendleft(change)
