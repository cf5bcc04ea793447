"""The checklist of `status`: what was observed, judged against limits. Pure."""

from collections.abc import Iterator, Sequence

from msgspec import Struct

from helena_cli.batch.ledger import Flusher, Flushes, Lane, Queue
from helena_cli.cli.render import duration, many, milliseconds, number
from helena_cli.database.health import Health

RESPONSE_MS = 100.0
LONGEST_QUERY_SECONDS = 10.0
OPERATIONS_PER_SECOND = 500.0
QUEUE_SECONDS = 60.0
HEARTBEAT_SECONDS = 60.0
#: Shares of the usable connections.
POOL_WARN, POOL_CRITICAL = 0.8, 0.95
#: A rate is judged when flushes carry at least so many operations; small ones are mostly latency.
LOAD = 100


class Check(Struct, frozen=True):
    """One line of the checklist: `status` is ok, warn, critical or unknown."""

    name: str
    status: str
    value: float | None
    limit: float | None
    message: str
    remedy: str | None = None


class Observed(Struct, frozen=True):
    """What the checks look at. `health` is None when the database could not be asked."""

    queue: Queue
    lanes: Sequence[Lane]
    flushes: Flushes
    flusher: Flusher | None
    flusher_running: bool
    health: Health | None
    now: float
    #: Operations that a repair of the spool could not bring back.
    lost: int = 0


def judge(seen: Observed) -> list[Check]:
    """The whole checklist, the queue first."""
    checks = [_queue_age(seen), _dead_letters(seen), _flusher(seen), _throughput(seen.flushes)]
    if seen.health is None:
        away = "the database did not answer"
        checks.append(
            Check("response_time", "critical", None, RESPONSE_MS, away, "See Database above.")
        )
        names = ("pool", "longest_query", "gin_pending")
        return [*checks, *(Check(name, "unknown", None, None, away) for name in names)]
    return [*checks, *_database(seen.health)]


def _database(health: Health) -> Iterator[Check]:
    yield _response_time(health)
    yield _pool(health)
    yield _longest_query(health)
    yield _gin_pending(health)


def _graded(value: float, limit: float) -> str:
    """Warn from half of the limit, critical above it."""
    return "critical" if value > limit else "warn" if value > limit / 2 else "ok"


def _queue_age(seen: Observed) -> Check:
    age = seen.queue.oldest_seconds
    if age is None:
        return Check("queue_age", "ok", 0.0, QUEUE_SECONDS, "the queue is empty")
    status = _graded(age, QUEUE_SECONDS)
    message = f"the oldest operation has waited {duration(age)}"
    waiting = [lane.table for lane in seen.lanes if lane.reason]
    remedy = None
    if status != "ok" and waiting:
        remedy = f"See the waiting tables: {', '.join(waiting)}."
    elif status != "ok":
        remedy = "See Last flush and Database; helena process-pending writes what can be written."
    return Check("queue_age", status, age, QUEUE_SECONDS, message, remedy)


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


def _throughput(flushes: Flushes) -> Check:
    rate, limit = flushes.operations_per_second, OPERATIONS_PER_SECOND
    if rate is None or not flushes.count or flushes.operations / flushes.count < LOAD:
        return Check("throughput", "unknown", rate, limit, "not judged: there was no load")
    message = f"{number(rate)} operations/s while flushing"
    if rate >= limit:
        return Check("throughput", "ok", rate, limit, message)
    remedy = "Look for triggers, locks and slow disks: the writer itself does far more."
    return Check("throughput", "warn", rate, limit, message, remedy)


def _response_time(health: Health) -> Check:
    value = health.response_ms
    if value is None:
        reason = health.unknown.get("response_ms", "not measured")
        return Check("response_time", "unknown", None, RESPONSE_MS, reason)
    status = _graded(value, RESPONSE_MS)
    remedy = None if status == "ok" else "The server or the way to it is slow."
    return Check("response_time", status, value, RESPONSE_MS, milliseconds(value), remedy)


def _pool(health: Health) -> Check:
    used, usable = health.connections.used, health.connections.max
    if used is None or not usable:
        return Check("pool", "unknown", used, usable, health.unknown.get("connections", "unknown"))
    share = used / usable
    status = "critical" if share >= POOL_CRITICAL else "warn" if share >= POOL_WARN else "ok"
    remedy = None if status == "ok" else "Find out who holds them: pg_stat_activity, by user."
    return Check("pool", status, used, usable, f"{used} of {usable} connections in use", remedy)


def _longest_query(health: Health) -> Check:
    value, limit = health.longest_query_seconds, LONGEST_QUERY_SECONDS
    if value is None:
        reason = health.unknown.get("active_queries", "unknown")
        return Check("longest_query", "unknown", None, limit, reason)
    status = _graded(value, limit)
    message = f"the longest query has run for {duration(value)}" if value else "no query is running"
    remedy = None if status == "ok" else "See who runs it: pg_stat_activity, by query_start."
    return Check("longest_query", status, value, limit, message, remedy)


def _gin_pending(health: Health) -> Check:
    if "gin" in health.unknown:
        return Check("gin_pending", "unknown", None, None, health.unknown["gin"])
    known = [index for index in health.gin if index.pending_pages is not None]
    if not known:
        if not health.gin:
            return Check("gin_pending", "ok", 0, None, "there are no GIN indexes")
        reason = health.gin[0].reason or "unknown"
        cure = "An administrator can: CREATE EXTENSION pgstattuple; GRANT pg_stat_scan_tables."
        return Check("gin_pending", "unknown", None, None, reason, cure)
    worst = max(known, key=lambda index: (index.pending_pages or 0) / max(1, index.limit_pages))
    pending, limit = worst.pending_pages or 0, worst.limit_pages
    status = _graded(pending, limit)
    message = f"{worst.index}: {pending:,} of {many(limit, 'page')}"
    remedy = None if status == "ok" else f"VACUUM {worst.table} empties the list."
    return Check("gin_pending", status, pending, limit, message, remedy)
