"""Who blocks whom, as one look at the server found it. Nothing here asks the server.

A node is a session, by its pid, or a prepared transaction, by its name. An edge leads from one that
waits to one that it waits for: the holder of a lock, or somebody before it in the queue.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import datetime

from msgspec import Struct
from msgspec.structs import replace

#: The pid of a session, or the name of a prepared transaction.
Key = int | str

#: Who waits → for whom.
Edges = Mapping[Key, frozenset[Key]]

IDLE_IN_TRANSACTION = ("idle in transaction", "idle in transaction (aborted)")


class Awaited(Struct, frozen=True):
    """The lock that a session waits for: its kind and mode as pg_locks has them, and on what."""

    kind: str
    mode: str
    on: str

    def __str__(self) -> str:
        return f"{self.mode} on {self.on}"


class Session(Struct, frozen=True):
    """A session, or a prepared transaction: then `gid` is its name, and there is no pid.

    What the role may not see is None. Times are the server's; `seconds` is the age of the state,
    `waited` that of the wait.
    """

    pid: int | None
    gid: str | None = None
    #: Whether it belongs to the database that is to be freed.
    here: bool = True
    database: str | None = None
    user: str | None = None
    application: str = ""
    client: str = ""
    #: "client backend" is what a program has connected; anything else belongs to the server.
    backend_type: str | None = None
    state: str | None = None
    seconds: float | None = None
    query: str = ""
    backend_start: datetime | None = None
    xact_start: datetime | None = None
    query_start: datetime | None = None
    state_change: datetime | None = None
    #: The session that this one is a parallel worker of.
    leader: int | None = None
    superuser: bool = False
    #: Whether the role may end it, or roll it back.
    may_end: bool = False
    vacuum: bool = False
    awaits: Awaited | None = None
    waited: float | None = None
    blockers: frozenset[Key] = frozenset()
    #: The relations that it has locked or waits for, by oid.
    relations: frozenset[int] = frozenset()
    #: Those of them that it may have written to, or keeps others from writing to.
    written: frozenset[int] = frozenset()

    @property
    def key(self) -> Key:
        """What it is called among the others."""
        # Without a pid it is a prepared transaction, which has a name.
        return self.gid or "" if self.pid is None else self.pid

    @property
    def name(self) -> str:
        """Its pid; of a prepared transaction its name, as SQL writes it."""
        if self.gid is None:
            return str(self.pid)
        quoted = self.gid.replace("'", "''")
        return f"'{quoted}'"

    @property
    def label(self) -> str:
        """What a person calls it."""
        return f"pid {self.name}" if self.gid is None else f"the prepared transaction {self.name}"

    @property
    def transaction_seconds(self) -> float | None:
        """The age of its transaction."""
        if self.seconds is None or self.state_change is None or self.xact_start is None:
            return None
        # `seconds` is counted from there while it idles.
        return self.seconds + (self.state_change - self.xact_start).total_seconds()

    @property
    def idle_in_transaction(self) -> bool:
        """Whether it keeps its locks and does nothing."""
        return self.state in IDLE_IN_TRANSACTION

    @property
    def by_helena(self) -> bool:
        """Whether it is one of Helena's own."""
        return self.application.startswith("helena ")

    def same_transaction(self, other: "Session | None") -> bool:
        """Whether the other look saw the same session in the same transaction."""
        return (
            other is not None
            and self.backend_start == other.backend_start
            and self.xact_start == other.xact_start
        )


class Look(Struct, frozen=True):
    """All sessions of the database, and whoever blocks one of them, at one moment."""

    sessions: Mapping[Key, Session]

    @classmethod
    def of(cls, sessions: Iterable[Session]) -> "Look":
        """With parallel workers folded into the session that a client sees."""
        found = {session.key: session for session in sessions}
        for worker in [s for s in found.values() if s.leader not in (None, s.pid)]:
            leader = found.get(worker.leader or 0)
            if leader is None:
                continue
            del found[worker.key]
            found[leader.key] = replace(
                leader,
                awaits=leader.awaits or worker.awaits,
                blockers=(leader.blockers | worker.blockers) - {leader.key},
                relations=leader.relations | worker.relations,
                written=leader.written | worker.written,
            )
        return cls(found)

    def lasting(self, earlier: "Look") -> "Look":
        """Only with the waits that were there before, for the same transaction of the same holder.

        Where many take turns on one row, somebody waits at any moment, and nobody blocks.
        """
        sessions = {}
        for key, session in self.sessions.items():
            before = earlier.sessions.get(key)
            lasting: frozenset[Key] = frozenset()
            if before is not None and before.query_start == session.query_start:
                lasting = session.blockers & before.blockers
            sessions[key] = replace(
                session,
                blockers=frozenset(one for one in lasting if self._stays(one, earlier)),
            )
        return Look(sessions)

    def _stays(self, key: Key, earlier: "Look") -> bool:
        holder = self.sessions.get(key)
        return holder is not None and holder.same_transaction(earlier.sessions.get(key))

    def edges(self, named: Collection[Key] = ()) -> Edges:
        """Who of this database waits for whom.

        Advisory locks are left out: programs make others wait with them on purpose. Those count
        that are held by a session which idles in a transaction, or which is `named`.
        """
        found = {
            session.key: frozenset(
                key for key in session.blockers if self._counts(session, key, named)
            )
            for session in self.sessions.values()
            if session.here
        }
        return {key: blockers for key, blockers in found.items() if blockers}

    def advisory(self, named: Collection[Key] = ()) -> int:
        """How many sessions wait for advisory locks that are left out."""
        waiting = [s for s in self.sessions.values() if s.here and s.blockers]
        return len(waiting) - len(self.edges(named))

    def _counts(self, waiter: Session, blocker: Key, named: Collection[Key]) -> bool:
        holder = self.sessions.get(blocker)
        if holder is None:
            # It has ended between two lines of the same look.
            return False
        advisory = waiter.awaits is not None and waiter.awaits.kind == "advisory"
        return not advisory or blocker in named or holder.idle_in_transaction


def roots(edges: Edges) -> list[Key]:
    """Those who block others and wait for nobody, the one with the most behind it first."""
    blockers = {key for found in edges.values() for key in found}
    return sorted(
        (key for key in blockers if key not in edges),
        key=lambda key: (-len(behind(edges, key)), str(key)),
    )


def behind(edges: Edges, key: Key) -> frozenset[Key]:
    """All who wait for it, or for somebody who waits for it."""
    waiters = _waiters(edges)
    found: set[Key] = set()
    added = waiters.get(key, set())
    while added:
        found |= added
        added = set().union(*(waiters.get(one, ()) for one in added)) - found
    return frozenset(found)


def freed(edges: Edges, gone: Collection[Key]) -> frozenset[Key]:
    """Who gets on when these are gone, if each that gets on comes to its end."""
    return frozenset(key for rank in _ranks(edges, gone) for key in rank) - set(gone)


def depths(edges: Edges) -> Mapping[Key, int]:
    """How many have to come to an end before each, one after the other; 0 for the roots.

    Those that wait for each other in a circle are absent, and whoever waits for them.
    """
    return {key: depth for depth, rank in enumerate(_ranks(edges, roots(edges))) for key in rank}


def _waiters(edges: Edges) -> dict[Key, set[Key]]:
    """Who is waited for → who waits."""
    found: dict[Key, set[Key]] = {}
    for waiter, blockers in edges.items():
        for blocker in blockers:
            found.setdefault(blocker, set()).add(waiter)
    return found


def _ranks(edges: Edges, gone: Collection[Key]) -> Iterator[set[Key]]:
    """Those that are gone, those that get on by it, those that get on by these, and so on."""
    waiters = _waiters(edges)
    left = {waiter: len(blockers) for waiter, blockers in edges.items()}
    rank = set(gone)
    seen = set(gone)
    while rank:
        yield rank
        free: set[Key] = set()
        for key in rank:
            for waiter in waiters.get(key, ()):
                left[waiter] -= 1
                if not left[waiter] and waiter not in seen:
                    free.add(waiter)
        seen |= free
        rank = free
