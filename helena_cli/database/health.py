"""What a look at the database found: records, made by `checkup`. None is never zero."""

from collections.abc import Mapping
from datetime import datetime

from msgspec import Struct


class Connections(Struct, frozen=True):
    """Slots in use and usable by an ordinary role; in use by the batch writers of all hosts.

    The role and the database may have limits of their own.
    """

    used: int | None = None
    max: int | None = None
    helena: int | None = None
    role_used: int | None = None
    role_max: int | None = None
    database_used: int | None = None
    database_max: int | None = None


class Holder(Struct, frozen=True):
    """Who holds how many connections."""

    user: str | None
    application: str | None
    count: int

    @property
    def who(self) -> str:
        """The user, and what the program calls itself if it does."""
        name = self.user or "unknown"
        return f"{name} ({self.application})" if self.application else name


class Session(Struct, frozen=True):
    """One session. `seconds` is how long it waits, or has been in its state.

    What the role may not see is None. The pid 0 stands for prepared transactions, which have none.
    """

    pid: int
    user: str | None
    application: str | None
    state: str | None
    seconds: float | None
    query: str | None
    blocked_by: tuple[int, ...] = ()
    #: How many sessions wait for it, directly or behind others.
    holds_up: int = 0


class RelationLock(Struct, frozen=True):
    """An ACCESS EXCLUSIVE lock, held or asked for: whoever reads the relation now has to wait."""

    oid: int
    relation: str
    #: None for a prepared transaction.
    pid: int | None
    granted: bool

    @property
    def reason(self) -> str:
        """Why the relation is not looked at."""
        by = "a prepared transaction" if self.pid is None else f"pid {self.pid}"
        return f"locked by {by}" if self.granted else f"{by} waits for its lock"


class GinIndex(Struct, frozen=True):
    """The pending list of one GIN index, in pages; None with a `reason` when it is not known."""

    index: str
    table: str
    pending_pages: int | None
    limit_pages: int
    reason: str | None = None
    fastupdate: bool = True


class TableState(Struct, frozen=True):
    """What the statistics say of a table. Rows and bytes are estimates, bytes with the indexes."""

    table: str
    rows: int | None
    dead_rows: int | None
    bytes: int | None
    last_vacuum: datetime | None
    last_analyze: datetime | None
    #: Why reading it would have to wait.
    locked: str | None = None


class Position(Struct, frozen=True):
    """How far one spool has come in one table; `held` operations were put back."""

    spool: str
    table: str
    last_operation_id: int
    held: int
    updated_at: datetime


class HostRow(Struct, frozen=True):
    """A host that writes into this database: its spools, their tables, and when they last moved."""

    host: str
    spools: int
    tables: int
    updated_at: datetime
    held: int = 0
    positions: tuple[Position, ...] = ()


class Health(Struct, frozen=True):
    """One look at the database. `unknown` says, by the name of a field, why it is None or empty."""

    server_version: str
    #: Whether `helena init` was here.
    prepared: bool | None
    response_ms: float | None
    active_queries: int | None
    longest_query_seconds: float | None
    lock_waits: int | None
    idle_in_transaction: int | None
    connections: Connections
    gin: tuple[GinIndex, ...]
    hosts: tuple[HostRow, ...]
    unknown: Mapping[str, str]
    longest_query: Session | None = None
    longest_idle_seconds: float | None = None
    #: Sessions that wait for a lock, the longest first; not all when they are very many.
    waiting: tuple[Session, ...] = ()
    #: Sessions that others wait for and that wait for nobody themselves.
    blocking: tuple[Session, ...] = ()
    locks: tuple[RelationLock, ...] = ()
    #: Who holds the connections of the server, most first.
    holders: tuple[Holder, ...] = ()
    tables: tuple[TableState, ...] = ()
    #: The other database of the server that answered, when the database itself did not.
    via: str | None = None

    def lock_on(self, oid: int) -> RelationLock | None:
        """The lock that keeps readers off a relation: a holder before those who wait."""
        return next((lock for lock in self.locks if lock.oid == oid), None)

    @property
    def catalog_lock(self) -> RelationLock | None:
        """A lock on the system catalogs, behind which everything in this database hangs."""
        return next((lock for lock in self.locks if lock.oid < FIRST_USER_OID), None)


#: Relations below are the system catalogs, with the same number in every database.
FIRST_USER_OID = 16_384

NOTHING = Health("", None, None, None, None, None, None, Connections(), (), (), {})
