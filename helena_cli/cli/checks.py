"""The checklist of `status`: what was observed, judged against limits. Pure."""

from collections.abc import Iterator, Sequence

from msgspec import Struct

from helena_cli.batch.ledger import Flusher, Flushes, Lane, Queue
from helena_cli.cli.render import duration, many, milliseconds, number
from helena_cli.database.health import Connections, GinIndex, Health, Session
from helena_cli.errors import HelenaError
from helena_cli.settings import CheckSettings

HEARTBEAT_SECONDS = 60.0
#: Shares of the usable connections.
POOL_WARN, POOL_CRITICAL = 0.8, 0.95
NO_ANSWER = "the database did not answer"
FREE = "helena clear-locks shows who holds it up and offers to end that."
#: A rate is judged when flushes carry at least so many operations; small ones are mostly latency.
LOAD = 100


#: The limits when none are set.
DEFAULTS = CheckSettings()


class Check(Struct, frozen=True):
    """One line of the checklist: `status` is ok, warn, critical or unknown."""

    name: str
    status: str
    value: float | None
    limit: float | None
    message: str
    remedy: str | None = None


class Observed(Struct, frozen=True):
    """What the checks look at. `health` is None when nothing could be learnt of the database."""

    queue: Queue
    lanes: Sequence[Lane]
    flushes: Flushes
    flusher: Flusher | None
    flusher_running: bool
    health: Health | None
    now: float
    #: Operations that a repair of the spool could not bring back.
    lost: int = 0
    #: Why the database itself could not be asked; `health` is then what another one could tell.
    away: HelenaError | None = None
    slots_taken: bool = False


def judge(seen: Observed, limits: CheckSettings = DEFAULTS) -> list[Check]:
    """The whole checklist, the queue first."""
    return [
        _queue_age(seen, limits.queue_age_seconds),
        _dead_letters(seen),
        _flusher(seen),
        _throughput(seen.flushes, limits.operations_per_second),
        _response_time(seen, limits.response_ms),
        _pool(seen),
        _longest_query(seen.health, limits.longest_query_seconds),
        _gin_pending(None if seen.away else seen.health),
    ]


def _graded(value: float, limit: float) -> str:
    """Warn from half of the limit, critical above it."""
    return "critical" if value > limit else "warn" if value > limit / 2 else "ok"


def _queue_age(seen: Observed, limit: float) -> Check:
    age = seen.queue.oldest_seconds
    if age is None:
        return Check("queue_age", "ok", 0.0, limit, "the queue is empty")
    status = _graded(age, limit)
    message = f"the oldest operation has waited {duration(age)}"
    waiting = [lane.table for lane in seen.lanes if lane.reason]
    remedy = None
    if status != "ok" and waiting:
        remedy = f"See the waiting tables: {', '.join(waiting)}."
    elif status != "ok":
        remedy = "See Last flush and Database; helena process-pending writes what can be written."
    return Check("queue_age", status, age, limit, message, remedy)


def _dead_letters(seen: Observed) -> Check:
    count = seen.queue.dead_letters
    if count == 0:
        return Check("dead_letters", "ok", 0, 0, "none")
    message = f"the database refused {many(count, 'operation')}"
    remedy = "helena dead-letters list says why; then retry or drop them."
    return Check("dead_letters", "warn", count, 0, message, remedy)


def _flusher(seen: Observed) -> Check:
    def check(status: str, value: float | None, message: str, remedy: str | None = None) -> Check:
        return Check("flusher", status, value, HEARTBEAT_SECONDS, message, remedy)

    last = seen.flushes.last
    if not seen.flusher_running:
        if seen.queue.total == 0:
            return check("ok", None, "none is needed: the queue is empty")
        remedy = "helena process-pending writes what waits; so does the next script at its end."
        return check("warn", None, "no process of this host writes the queue", remedy)
    if seen.flusher is None:
        return check("ok", None, "a process has just begun to write")
    silence = max(0.0, seen.now - seen.flusher.heartbeat)
    if silence > HEARTBEAT_SECONDS:
        message = f"process {seen.flusher.pid} gave no sign of life for {duration(silence)}"
        return check("critical", silence, message, "If it hangs, end it: another takes over.")
    if last is not None and last.error is not None:
        return check("warn", silence, f"the last flush failed: {last.error}", "See Last flush.")
    return check("ok", silence, f"process {seen.flusher.pid} is alive")


def _throughput(flushes: Flushes, limit: float) -> Check:
    rate = flushes.operations_per_second
    if rate is None or not flushes.count or flushes.operations / flushes.count < LOAD:
        return Check("throughput", "unknown", rate, limit, "not judged: there was no load")
    message = f"{number(rate)} operations/s while flushing"
    if rate >= limit:
        return Check("throughput", "ok", rate, limit, message)
    remedy = "Look for triggers, locks and slow disks: the writer itself does far more."
    return Check("throughput", "warn", rate, limit, message, remedy)


def _response_time(seen: Observed, limit: float) -> Check:
    value = None if seen.health is None else seen.health.response_ms
    if seen.health is None or seen.away is not None:
        cure = "See Database above." if seen.away is None else seen.away.remedy
        return Check("response_time", "critical", None, limit, NO_ANSWER, cure)
    if value is None:
        reason = seen.health.unknown.get("response_ms", "not measured")
        return Check("response_time", "unknown", None, limit, reason)
    status = _graded(value, limit)
    remedy = None if status == "ok" else "The server or the way to it is slow."
    return Check("response_time", status, value, limit, milliseconds(value), remedy)


def _pool(seen: Observed) -> Check:
    if seen.slots_taken:
        cure = None if seen.away is None else seen.away.remedy
        return Check("pool", "critical", None, None, "all connections are taken", cure)
    if seen.health is None:
        return Check("pool", "unknown", None, None, NO_ANSWER)
    slots = seen.health.connections
    if slots.used is None or not slots.max:
        reason = seen.health.unknown.get("connections", "unknown")
        return Check("pool", "unknown", slots.used, slots.max, reason)
    share, used, usable, whose = max(_shares(slots))
    status = "critical" if share >= POOL_CRITICAL else "warn" if share >= POOL_WARN else "ok"
    message = f"{used} of {usable} connections {whose}in use"
    remedy = None
    if status != "ok":
        held = ", ".join(f"{one.count} by {one.who}" for one in seen.health.holders)
        remedy = f"{held or 'See pg_stat_activity'}. End what is not needed, or raise the limit."
    return Check("pool", status, used, usable, message, remedy)


def _shares(slots: Connections) -> Iterator[tuple[float, int, int, str]]:
    """How far each limit is used up: the share, slots in use, slots there are, and whose."""
    for used, usable, whose in (
        (slots.used, slots.max, ""),
        (slots.role_used, slots.role_max, "of this role "),
        (slots.database_used, slots.database_max, "of this database "),
    ):
        if used is not None and usable is not None:
            yield used / usable if usable else 1.0, used, usable, whose


def _longest_query(health: Health | None, limit: float) -> Check:
    def check(status: str, value: float | None, message: str, remedy: str | None = None) -> Check:
        return Check("longest_query", status, value, limit, message, remedy)

    if health is None:
        return check("unknown", None, NO_ANSWER)
    value = health.longest_query_seconds
    waiter = health.waiting[0] if health.waiting else None
    if value is None:
        # Who waits for a lock shows even to a role that may not see what the others do.
        if waiter is not None and (waiter.seconds or 0.0) > limit:
            return check("critical", waiter.seconds, _waits(waiter), FREE)
        return check("unknown", None, health.unknown.get("active_queries", "unknown"))
    status, query = _graded(value, limit), health.longest_query
    if status == "ok":
        message = f"the longest query has run for {duration(value)}"
        return check(status, value, message if value else "no query is running")
    waiter = next((one for one in health.waiting if query and one.pid == query.pid), None)
    if waiter is not None:
        return check(status, value, _waits(waiter), FREE)
    who = f"pid {query.pid} ({query.user})" if query else "a query"
    cure = "helena clear-locks --all shows it and offers to end it."
    return check(status, value, f"{who} has run for {duration(value)}", cure)


def _waits(waiter: Session) -> str:
    """Whom the session waits for."""
    ahead = " and ".join(
        f"pid {pid}" if pid else "a prepared transaction" for pid in waiter.blocked_by
    )
    return f"pid {waiter.pid} has waited {duration(waiter.seconds)} for {ahead or 'a lock'}"


def _gin_pending(health: Health | None) -> Check:
    def check(status: str, message: str, remedy: str | None = None) -> Check:
        return Check("gin_pending", status, None, None, message, remedy)

    if health is None:
        return check("unknown", NO_ANSWER)
    if "gin" in health.unknown:
        return check("unknown", health.unknown["gin"])
    known = [index for index in health.gin if index.pending_pages is not None]
    if not health.gin:
        return Check("gin_pending", "ok", 0, None, "there are no GIN indexes")
    if not known:
        return check("unknown", health.gin[0].reason or "unknown", _cure(health.gin[0]))
    worst = max(known, key=lambda index: (index.pending_pages or 0) / max(1, index.limit_pages))
    pending, limit = worst.pending_pages or 0, worst.limit_pages
    status = _graded(pending, limit)
    message = f"{worst.index}: {pending:,} of {many(limit, 'page')}"
    unread = len(health.gin) - len(known)
    if unread:
        message += f"; {unread} could not be read"
    remedy = None if status == "ok" else f"VACUUM {worst.table} empties the list."
    return Check("gin_pending", status, pending, limit, message, remedy)


def _cure(index: GinIndex) -> str | None:
    if "pgstattuple" in str(index.reason):
        return "An administrator can: CREATE EXTENSION pgstattuple."
    if "pg_monitor" in str(index.reason):
        return "An administrator can: GRANT pg_monitor TO the role."
    return None
