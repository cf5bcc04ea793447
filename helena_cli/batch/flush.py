"""What goes into a flush and what comes out of it: the contract between engine and writer."""

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from msgspec import Struct

from helena_cli.batch.operation import Operation
from helena_cli.batch.reading import Reading
from helena_cli.batch.verdict import Verdict


class Taken(Struct, frozen=True):
    """Operations that are written next, or after those that are written now."""

    operations: tuple[Operation, ...] = ()
    #: Whether there are more than these.
    more: bool = False
    #: Lane → what `Writer.read_ahead` made of some of them.
    readings: Mapping[str, Reading] = {}


class Batch(Struct, frozen=True):
    """Operations for one transaction, and what the spool knows about its earlier ones."""

    spool_id: str
    #: The `helena.meta` id of the database this spool belongs to; None before the first contact.
    target_id: str | None
    #: By id. Of each table they are a prefix of what the spool holds, plus all of its held ones.
    operations: tuple[Operation, ...]
    #: Written into the position rows by this flush.
    nonce: str
    #: Table → the nonces that an earlier flush of this spool may have left in its position row.
    known_nonces: Mapping[str, frozenset[str]]
    #: A waiting lane is tried again: do not let a lock hold up the others for long.
    probe: bool = False
    #: Unknown SQLSTATEs were retried often enough: blame the row.
    blame_rows: bool = False
    #: Lane → what `Writer.read_ahead` made of some of its operations.
    ahead: Mapping[str, Reading] = {}


class Waiting(Struct, frozen=True):
    """Why a whole lane was left out of a flush."""

    reason: str
    sqlstate: str | None = None
    remedy: str = ""


class Outcome(Struct, frozen=True):
    """What became of each operation of a batch.

    An operation of a waiting lane is in none of the lists.
    """

    target_id: str
    #: Ids whose values are in the table by a row of their own, or a message that was left alone.
    written: tuple[int, ...] = ()
    #: Ids whose values went into the row of another operation on the same key.
    coalesced: tuple[int, ...] = ()
    #: Ids that an earlier flush had applied already.
    skipped: tuple[int, ...] = ()
    dead: tuple[Verdict, ...] = ()
    held: tuple[Verdict, ...] = ()
    #: Table → why its lane waits.
    waiting: Mapping[str, Waiting] = {}
    #: Tables whose lanes moved.
    settled_tables: frozenset[str] = frozenset()
    #: Table → the nonce that its position row had before this flush.
    nonces: Mapping[str, str] = {}
    #: Rows sent to the server.
    rows: int = 0


class FlushFailed(Exception):
    """Nothing is known to be written; the whole batch stays in the spool and is tried again."""

    def __init__(
        self,
        message: str,
        *,
        sqlstate: str | None = None,
        remedy: str = "",
        halve: bool = False,
        unknown: bool = False,
    ) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
        self.remedy = remedy
        #: The statement took too long: try again with half of the operations.
        self.halve = halve
        #: The SQLSTATE is in none of the known classes.
        self.unknown = unknown


class Writer(Protocol):
    """Writes batches into a database. Not safe for threads: the engine's flusher owns it."""

    def write(
        self,
        batch: Batch,
        *,
        hold: Callable[[Operation, str], bool],
        seal: Callable[[Outcome], None],
        busy: Callable[[], None],
    ) -> Outcome:
        """Apply a batch in one transaction and return what became of each operation.

        `hold(operation, parent)` decides whether a foreign-key violation is put back (True) or
        dead. `seal(outcome)` is called once, after the last statement and before COMMIT: it makes
        nonce and dead letters durable. `busy()` is called when the database will be for a while.
        Raises FlushFailed.
        """

    def read_ahead(self, operations: Iterable[Operation]) -> Mapping[str, Reading]:
        """Read operations of the next batch, by lane, while another thread writes this one.

        It spares `write` the work; nothing depends on it.
        """

    def maintain(self, tables: frozenset[str]) -> None:
        """Empty the GIN pending lists of these tables on a second connection. Never raises.

        It may run in a thread of its own, beside all others; `close` waits for it.
        """

    def close(self) -> None:
        """Close all connections."""
