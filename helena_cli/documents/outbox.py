"""Changed documents on their way into the queue, a bounded number at once."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

from msgspec import Struct

from helena_cli.documents.known import Sink
from helena_cli.errors import InvalidOperation, SpoolFull

Change = Literal["new", "changed", "missing"]
Triple = tuple[str, str, Mapping[str, Any]]

#: Handed to the queue together: operations, and bytes of the text they were made of.
CHUNK = 500
CHUNK_BYTES = 8 * 1024 * 1024


class Failure(Struct, frozen=True):
    """A file, or a folder, that something is wrong with."""

    path: str
    reason: str
    #: Whether the file has a row all the same.
    indexed: bool = False


class Item(Struct, frozen=True, gc=False):
    """One change: the document's operation, and the message about it if there is one."""

    change: Change
    path: str
    operations: tuple[Triple, ...]
    weight: int = 0


class Outbox:
    """Collects changes and queues them in chunks: the flusher writes while the scan goes on.

    `counts` and `failures` say what became of them. Nothing is queued in a dry run.
    """

    def __init__(self, queue: Sink, *, dry_run: bool) -> None:
        self.counts: Counter[Change] = Counter()
        self.failures: list[Failure] = []
        self._queue = queue
        self._dry_run = dry_run
        self._items: list[Item] = []
        self._weight = 0

    def add(self, item: Item) -> None:
        """Take a change; what is collected is queued when it is enough."""
        self._items.append(item)
        self._weight += item.weight
        if len(self._items) >= CHUNK or self._weight >= CHUNK_BYTES:
            self.flush()

    def flush(self) -> None:
        """Queue what is collected. Raises SpoolFull or SpoolUnavailable."""
        items, self._items, self._weight = self._items, [], 0
        self._divide(items)

    def _divide(self, items: list[Item]) -> None:
        """Queue these; if that is refused, by halves: one of them is bad, or there is little room.

        The queue takes all or none, and all may be more than it ever has room for.
        """
        try:
            self._extend(items)
        except (InvalidOperation, SpoolFull) as error:
            if len(items) > 1:
                middle = len(items) // 2
                self._divide(items[:middle])
                self._divide(items[middle:])
            elif isinstance(error, SpoolFull):
                raise
            else:
                self.failures.append(Failure(items[0].path, str(error)))

    def _extend(self, items: list[Item]) -> None:
        operations = [operation for item in items for operation in item.operations]
        if operations and not self._dry_run:
            self._queue.extend(operations)
        self.counts.update(item.change for item in items)
