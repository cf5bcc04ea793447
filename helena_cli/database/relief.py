"""The plan to free a database: the smallest actions that work. Nothing here asks the server.

Where a statement that waits in the queue for a strong lock holds up all the others, it is enough to
cancel that one: whoever it waits for goes on. Else a query at the root is cancelled, a session that
idles in its transaction is terminated, a prepared transaction is rolled back.
"""

from collections.abc import Collection, Iterator
from typing import Literal

from msgspec import Struct

from helena_cli.database.blocking import Edges, Key, Look, Session, behind, freed, roots

Deed = Literal["cancel", "terminate", "rollback prepared"]

#: Nobody else can write, or read, behind a statement that waits for one of these.
STRONG = ("ShareLock", "ShareRowExclusiveLock", "ExclusiveLock", "AccessExclusiveLock")

#: Seconds from which a session that blocks nobody is taken for a stuck one.
LONG = 300.0

#: Seconds that a session may idle which has just been freed itself: its program may be about to
#: commit. Longer than one run waits, so it is for the next run to end it.
GRACE = 10.0


class Scope(Struct, frozen=True):
    """Which sessions may be ended. Empty: any."""

    pids: frozenset[int] = frozenset()
    users: frozenset[str] = frozenset()
    #: Oids; None: any.
    relations: frozenset[int] | None = None
    #: Seconds in their present state; None: any, and LONG for those that block nobody.
    older_than: float | None = None
    #: Also those that block nobody.
    everything: bool = False

    def covers(self, session: Session) -> bool:
        """Whether this one may be ended."""
        return (
            (not self.pids or session.pid in self.pids)
            and (not self.users or session.user in self.users)
            and (self.relations is None or bool(self.relations & session.relations))
            and (self.older_than is None or (session.seconds or 0.0) >= self.older_than)
        )


class Action(Struct, frozen=True):
    """What is to be done to one session, why, and how many others get on by it."""

    session: Session
    deed: Deed
    reason: str
    frees: int = 0


class Spared(Struct, frozen=True):
    """A session that would have to go, why it is left alone, and what a person can do."""

    session: Session
    reason: str
    remedy: str


class Plan(Struct, frozen=True):
    """What is to be done, in this order, and what is found but left alone."""

    look: Look
    edges: Edges
    actions: tuple[Action, ...] = ()
    spared: tuple[Spared, ...] = ()
    #: Tables that the actions concern, by oid of a relation.
    relations: frozenset[int] = frozenset()

    @property
    def blocked(self) -> int:
        """How many sessions wait for a lock."""
        return len(self.edges)


def make_plan(look: Look, scope: Scope) -> Plan:
    """What to do about this."""
    planner = _Planner(look, scope)
    for root in roots(planner.edges):
        planner.relieve(root)
    planner.add_named()
    if scope.everything:
        planner.add_idle_and_long()
    return planner.plan()


def follow_up(plan: Plan, done: Collection[Action], cancelled: Collection[Key]) -> Plan:
    """What of a new plan belongs to the one that was done already.

    A session that was freed is at work again, and gets the time for it; unless it idles now itself
    for longer than GRACE, or in a transaction older than LONG. Whoever was cancelled in vain is
    terminated.
    """
    acted = [action.session for action in done]
    actions: list[Action] = []
    spared = list(plan.spared)
    for action in plan.actions:
        session = action.session
        again = any(s.key == session.key and session.same_transaction(s) for s in acted)
        if again and session.pid in cancelled:
            reason = f"{action.reason}; to cancel its query did not help"
            actions.append(Action(session, "terminate", reason, action.frees))
        elif again or _idles_for_long(session):
            actions.append(action)
        else:
            spared.append(_freed_just_now(session))
    return Plan(plan.look, plan.edges, tuple(actions), tuple(spared), plan.relations)


def _idles_for_long(session: Session) -> bool:
    age = session.transaction_seconds or 0.0
    return session.idle_in_transaction and ((session.seconds or 0.0) >= GRACE or age >= LONG)


def _freed_just_now(session: Session) -> Spared:
    if session.idle_in_transaction:
        return Spared(
            session,
            "it waited itself before, and may be about to commit",
            f"Give it {GRACE:.0f} s, then type again: helena clear-locks. That ends it if it still "
            "idles.",
        )
    return Spared(
        session,
        "it waited itself before, and is at work now",
        "Give it time; if it does not come to an end, type again: helena clear-locks",
    )


class _Planner:
    def __init__(self, look: Look, scope: Scope) -> None:
        self._look = look
        self._scope = scope
        self.edges = look.edges(scope.pids)
        self._actions: list[Action] = []
        self._spared: dict[Key, Spared] = {}
        self._gone: set[Key] = set()

    def relieve(self, root: Key) -> None:
        """Free those behind a root: by the queue where that does, else by the root itself."""
        session = self._look.sessions[root]
        waiting = behind(self.edges, root) - self._gone
        spared = spare(session)
        allowed = spared is None and self._scope.covers(session)
        queued = self._queued(waiting, need_all=allowed)
        if queued:
            for key in queued:
                self._add(key, "cancel", "it waits for a strong lock, and others wait behind it")
        elif allowed:
            self._add(root, *_deed(session))
        else:
            self._spared[root] = spared or Spared(
                session,
                "the options given leave it out",
                "Run helena clear-locks without them to see what it would do.",
            )

    def add_named(self) -> None:
        """Those that --pid names, also when they block nobody."""
        for pid in sorted(self._scope.pids - self._gone):
            session = self._look.sessions.get(pid)
            if session is None:
                gone = Session(pid=pid, application="")
                remedy = "It has ended, or belongs to another database: see helena status."
                self._spared[pid] = Spared(gone, "there is no such session", remedy)
            elif spared := spare(session):
                self._spared[pid] = spared
            elif session.state == "idle" and pid not in {k for b in self.edges.values() for k in b}:
                remedy = f"To end it all the same: SELECT pg_terminate_backend({pid});"
                self._spared[pid] = Spared(session, "it does nothing and holds nothing", remedy)
            elif self._scope.covers(session):
                self._add(pid, *_deed(session))

    def add_idle_and_long(self) -> None:
        """Those that block nobody yet: idle in a transaction, or with a long query."""
        limit = LONG if self._scope.older_than is None else self._scope.older_than
        for key, session in self._look.sessions.items():
            busy = session.idle_in_transaction or session.state == "active"
            if key in self._gone or key in self.edges or not busy or not session.here:
                continue
            if session.by_helena or (session.seconds or 0.0) < limit:
                continue
            if spare(session) is None and self._scope.covers(session):
                self._add(key, *_deed(session))

    def plan(self) -> Plan:
        """All of it, with the relations that it concerns."""
        free = freed(self.edges, self._gone)
        relations = {oid for a in self._actions for oid in a.session.written}
        relations |= {oid for key in free for oid in self._look.sessions[key].written}
        return Plan(
            self._look,
            self.edges,
            tuple(self._actions),
            tuple(self._spared.values()),
            frozenset(relations),
        )

    def _queued(self, waiting: Collection[Key], *, need_all: bool) -> list[Key]:
        """Which queued statements to cancel so that all others who wait get on; or some of them."""
        queued = [key for key in sorted(waiting, key=str) if self._is_queued(key)]
        others = frozenset(waiting) - set(queued)

        def helped(without: Collection[Key]) -> frozenset[Key]:
            return others & freed(self.edges, self._gone | set(without))

        best = helped(queued)
        if not best or (need_all and best != others):
            return []
        for key in [*queued]:
            fewer = [one for one in queued if one != key]
            if helped(fewer) == best:
                queued = fewer
        return queued

    def _is_queued(self, key: Key) -> bool:
        session = self._look.sessions[key]
        awaits = session.awaits
        return (
            awaits is not None
            and awaits.kind == "relation"
            and awaits.mode in STRONG
            and not session.by_helena
            and spare(session, queued=True) is None
            and self._scope.covers(session)
        )

    def _add(self, key: Key, deed: Deed, reason: str) -> None:
        before = freed(self.edges, self._gone)
        self._gone.add(key)
        frees = len(freed(self.edges, self._gone) - before)
        self._actions.append(Action(self._look.sessions[key], deed, reason, frees))


def _deed(session: Session) -> tuple[Deed, str]:
    """The smallest action that ends what this one holds, and why it is that one."""
    if session.gid is not None:
        return "rollback prepared", (
            "it is prepared, and was neither committed nor rolled back; to keep what it did "
            f"instead: COMMIT PREPARED {session.name};"
        )
    if session.idle_in_transaction:
        return "terminate", "it idles in a transaction, where there is no query to cancel"
    if session.state == "idle":
        return "terminate", "it idles and keeps a lock of its session"
    return "cancel", "its query is running"


def spare(session: Session, *, queued: bool = False) -> Spared | None:
    """Why this session must not be ended, or cannot be; None when it can. `queued`: it waits."""
    for reason, remedy in _reasons(session, queued=queued):
        return Spared(session, reason, remedy)
    return None


def _reasons(session: Session, *, queued: bool) -> Iterator[tuple[str, str]]:
    if not session.here:
        name = session.database or "the server itself"
        yield f"it belongs to {name}", "Run helena clear-locks for that database."
    elif session.gid is not None:
        if not session.may_end:
            yield (
                f"only {session.user} or a superuser may end it, in its own database",
                f"Let them run there: ROLLBACK PREPARED {session.name}; or, to keep what it did: "
                f"COMMIT PREPARED {session.name};",
            )
    elif session.backend_type not in (None, "client backend"):
        yield (
            f"it is the server's own: {session.backend_type}",
            "Wait for it. An autovacuum gives way by itself, unless it prevents a wraparound.",
        )
    elif session.superuser and not session.may_end:
        yield "it belongs to a superuser", _by_another(session)
    elif not session.may_end:
        yield (
            f"this role may not end what belongs to {session.user or 'the server itself'}",
            f"GRANT pg_signal_backend, pg_read_all_stats TO this role; or {_by_another(session)}",
        )
    elif session.backend_type is None:
        yield (
            "this role may not see what it does",
            f"GRANT pg_read_all_stats TO this role; or {_by_another(session)}",
        )
    elif session.vacuum and not queued:
        yield (
            "it is a VACUUM",
            f"Wait for it; if it must end: SELECT pg_cancel_backend({session.pid});",
        )


def _by_another(session: Session) -> str:
    users = [session.user] if session.user and not session.superuser else []
    who = " or ".join([*users, "a superuser"])
    return f"let {who} run: SELECT pg_terminate_backend({session.pid});"
