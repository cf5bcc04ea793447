"""How `helena status` looks to a person. Pure: what was observed becomes things to print."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from helena_cli.batch.ledger import Flushes, Queue
from helena_cli.cli import render
from helena_cli.cli.checks import Check, Observed
from helena_cli.database.health import NOTHING, Health, Session

if TYPE_CHECKING:
    from datetime import datetime

    from rich.console import RenderableType

#: How the limits look that no message tells.
_LIMITS: Mapping[str, Callable[[float | None], str]] = {
    "queue_age": render.duration,
    "flusher": render.duration,
    "throughput": lambda limit: f"{render.number(limit)}/s",
    "response_time": render.milliseconds,
    "longest_query": render.duration,
}

Others = Sequence[tuple[Path, Queue | None]]

SEVERITY = ("critical", "warn", "unknown", "ok")

#: A statement is shown up to here; --json has more of it.
QUERY_CHARS = 100


def page(
    label: str, spool: Path, seen: Observed, others: Others, checks: Sequence[Check]
) -> "Iterator[RenderableType]":
    """The parts in the order of a page: what to act on last, nearest to the next prompt."""
    health = seen.health or NOTHING
    yield render.facts(_facts(label, spool, seen))
    yield from _hosts(health, seen.now)
    yield from _tables(health, seen.now)
    yield from _gin(health)
    yield from _others(others)
    yield from _lanes(seen)
    yield from _holding_up(health)
    yield from _checks(checks)


def complaints(label: str, seen: Observed, checks: Sequence[Check]) -> "Iterator[RenderableType]":
    """Only what somebody has to look at."""
    yield render.facts([("Target", label), *_database(seen)])
    yield from _holding_up(seen.health or NOTHING)
    yield from _checks([check for check in checks if check.status in ("critical", "warn")])


def screen(
    label: str, spool: Path, seen: Observed, others: Others, checks: Sequence[Check]
) -> "Iterator[RenderableType]":
    """The parts in the order of a screen: what to act on first, for its lower end may be cut."""
    health = seen.health or NOTHING
    yield from _checks(sorted(checks, key=lambda check: SEVERITY.index(check.status)))
    yield from _holding_up(health)
    yield from _lanes(seen)
    yield render.heading("Facts")
    yield render.facts(_facts(label, spool, seen))
    yield from _others(others)
    yield from _gin(health)
    yield from _tables(health, seen.now)
    yield from _hosts(health, seen.now)


def _facts(label: str, spool: Path, seen: Observed) -> Iterator[tuple[str, object]]:
    queue, flushes, last = seen.queue, seen.flushes, seen.flushes.last
    kinds = f"{queue.insert:,} insert, {queue.update:,} update, {queue.message:,} message"
    yield "Target", label
    yield from _database(seen)
    yield "Queue", f"{render.many(queue.total, 'operation')} ({kinds}), {_oldest(queue)}"
    yield "Spool", f"{spool}, {render.size(queue.spool_bytes)} in use"
    yield "Flusher", _flusher(seen)
    yield "Flushes", _flushes(flushes)
    if last is not None:
        done = f"failed: {last.error}" if last.error else render.many(last.operations, "operation")
        ago = render.duration(max(0.0, seen.now - last.at))
        took = render.milliseconds(last.seconds * 1000)
        yield "Last flush", f"{ago} ago, took {took}: {done}"
    yield "Dead letters", f"{queue.dead_letters:,}"
    if seen.lost:
        text = f"{render.many(seen.lost, 'operation')}, when a damaged spool was repaired"
        yield "Lost", render.cell(text, render.STYLES["critical"])


def _database(seen: Observed) -> Iterator[tuple[str, object]]:
    health = seen.health
    if seen.away is not None:
        yield "Database", render.cell(seen.away, render.STYLES["critical"])
        yield "What to do", seen.away.remedy
    if health is None:
        return
    if health.prepared is False:
        yield "Tables", "Helena's tables are missing. Run: helena init"
    if seen.away is None:
        answers = render.milliseconds(health.response_ms)
        yield "Database", f"PostgreSQL {health.server_version}, answers in {answers}"
    elsewhere = f" (as the database {health.via} sees it)" if health.via else ""
    yield "Activity", _activity(health) + elsewhere
    slots = health.connections
    used = f"{_known(slots.used)} of {_known(slots.max)} in use, {_known(slots.helena)} by Helena"
    yield "Connections", used
    for name, reason in health.unknown.items():
        yield "Unknown", f"{name}: {reason}"


def _activity(health: Health) -> str:
    active = f"{_known(health.active_queries)} active queries"
    if health.longest_query is not None:
        active += f", the longest {render.duration(health.longest_query_seconds)}"
    idle = f"{_known(health.idle_in_transaction)} idle in transaction"
    if health.longest_idle_seconds is not None:
        idle += f" (for up to {render.duration(health.longest_idle_seconds)})"
    return f"{active}; {_known(health.lock_waits)} waiting for locks; {idle}"


def _known(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _oldest(queue: Queue) -> str:
    if queue.oldest_seconds is None:
        return "nothing waits"
    return f"the oldest {render.duration(queue.oldest_seconds)} old"


def _flushes(flushes: Flushes) -> str:
    if not flushes.count + flushes.failures:
        return "none yet"
    return (
        f"{flushes.count:,} with {render.many(flushes.operations, 'operation')}, "
        f"{flushes.failures:,} failed; p50 {render.milliseconds(flushes.p50_ms)}, "
        f"p99 {render.milliseconds(flushes.p99_ms)}, "
        f"{render.number(flushes.operations_per_second)} operations/s"
    )


def _flusher(seen: Observed) -> str:
    if not seen.flusher_running:
        return "none is running"
    if seen.flusher is None:
        return "running"
    since = render.local_time(seen.flusher.since)
    beat = render.duration(max(0.0, seen.now - seen.flusher.heartbeat))
    return f"running, process {seen.flusher.pid} since {since}, last sign of life {beat} ago"


def _hosts(health: Health, now: float) -> "Iterator[RenderableType]":
    if not health.hosts:
        return
    yield render.heading("Hosts that write into this database")
    yield render.table(
        ("host", "spools", "tables", "put back", "last write"),
        (
            (host.host, host.spools, host.tables, f"{host.held:,}", _ago(host.updated_at, now))
            for host in health.hosts
        ),
        right=("spools", "tables", "put back"),
    )


def _tables(health: Health, now: float) -> "Iterator[RenderableType]":
    if not health.tables:
        return
    yield render.heading("Tables (estimates of the server's statistics)")
    yield render.table(
        ("table", "rows", "dead", "size", "vacuum", "analyze", "lock"),
        (
            (
                table.table,
                render.number(table.rows),
                render.number(table.dead_rows),
                "-" if table.bytes is None else render.size(table.bytes),
                _ago(table.last_vacuum, now),
                _ago(table.last_analyze, now),
                table.locked,
            )
            for table in health.tables
        ),
        right=("rows", "dead", "size"),
    )


def _gin(health: Health) -> "Iterator[RenderableType]":
    if not health.gin:
        return
    yield render.heading("Pending lists of GIN indexes")
    read = [index for index in health.gin if index.pending_pages is not None]
    if read:
        yield render.table(
            ("index", "table", "pages", "limit", "note"),
            (
                (
                    index.index,
                    index.table,
                    f"{index.pending_pages:,}",
                    f"{index.limit_pages:,}",
                    None if index.fastupdate else "fastupdate is off",
                )
                for index in read
            ),
            right=("pages", "limit"),
        )
    # Mostly it is the same for all of them.
    unread: dict[str, list[str]] = {}
    for index in health.gin:
        if index.pending_pages is None:
            unread.setdefault(index.reason or "unknown", []).append(index.index)
    if unread:
        yield render.facts(
            ("Not read", f"{', '.join(names)} ({reason})") for reason, names in unread.items()
        )


def _lanes(seen: Observed) -> "Iterator[RenderableType]":
    waiting = [lane for lane in seen.lanes if lane.reason]
    if not waiting:
        return
    yield render.heading("Waiting tables (the others go on)")
    yield render.table(
        ("table", "operations", "since", "reason", "what to do"),
        (
            (
                lane.table,
                f"{lane.operations:,}",
                render.local_time(lane.since),
                lane.reason,
                lane.remedy,
            )
            for lane in waiting
        ),
        right=("operations",),
    )


def _others(others: Others) -> "Iterator[RenderableType]":
    shown = [(path, queue) for path, queue in others if queue is None or queue.total]
    if not shown:
        return
    yield render.heading("Queues for other databases")
    yield render.table(
        ("operations", "spool"),
        ((f"{queue.total:,}" if queue else "unreadable", path) for path, queue in shown),
        right=("operations",),
    )


def _holding_up(health: Health) -> "Iterator[RenderableType]":
    if not health.blocking:
        return
    yield render.heading("Who holds others up (helena clear-locks offers to end it)")
    yield render.table(
        ("pid", "user", "program", "state", "for", "holds up", "last statement"),
        (
            (
                session.pid or "-",
                session.user or "?",
                session.application,
                session.state or "?",
                render.duration(session.seconds),
                render.many(session.holds_up, "session"),
                _statement(session),
            )
            for session in health.blocking
        ),
        right=("pid",),
    )


def _statement(session: Session) -> str:
    text = render.plain(session.query)
    return text if len(text) <= QUERY_CHARS else f"{text[:QUERY_CHARS]} ..."


def _checks(checks: Sequence[Check]) -> "Iterator[RenderableType]":
    yield render.heading("Checks")
    yield render.table(
        ("status", "check", "what was found", "what to do"),
        (
            (
                render.cell(one.status, render.STYLES[one.status]),
                one.name,
                _found(one),
                one.remedy,
            )
            for one in checks
        ),
    )


def _found(check: Check) -> str:
    """What was found; with the limit that it comes near to, or is above."""
    show = _LIMITS.get(check.name)
    if show is None or check.value is None or check.status not in ("warn", "critical"):
        return check.message
    return f"{check.message} (limit {show(check.limit)})"


def _ago(moment: "datetime | None", now: float) -> str:
    if moment is None:
        return "never"
    return f"{render.duration(max(0.0, now - moment.timestamp()))} ago"
