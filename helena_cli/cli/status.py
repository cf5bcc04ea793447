"""`helena status`: the queue, its flusher and flushes, the database, and a checklist."""

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from helena_cli.cli import render
from helena_cli.cli.options import Common, with_common_options
from helena_cli.errors import ExitCode, HelenaError

if TYPE_CHECKING:
    from pathlib import Path

    from helena_cli.batch.ledger import Flushes, Queue
    from helena_cli.cli.checks import Check, Observed
    from helena_cli.database.health import Health
    from helena_cli.runtime import Runtime


@with_common_options
def command(
    common: Common,
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 1 when a check is critical.")
    ] = False,
) -> ExitCode:
    """Show the queue, the flushes, the database and a checklist.

    Exits with 0 whenever it could answer, and with 4 when the database is away: then the queue is
    shown all the same.
    """
    from helena_cli.cli.checks import judge
    from helena_cli.runtime import Runtime

    with Runtime(common.settings()) as runtime:
        health, away = _ask_database(runtime)
        seen = _observe(runtime, health)
        checks = judge(seen)
        others = _other_spools(runtime.other_spools())
        if common.json:
            render.print_json(_document(runtime.target.label, seen, away, others, checks))
        else:
            _print_facts(runtime, seen, away)
            _print_lanes(seen)
            _print_others(others)
            _print_checks(checks)
    if away is not None:
        return ExitCode.UNREACHABLE
    critical = any(one.status == "critical" for one in checks)
    return ExitCode.PARTIAL if check and critical else ExitCode.DONE


def _ask_database(runtime: "Runtime") -> "tuple[Health | None, HelenaError | None]":
    from helena_cli.database.health import probe
    from helena_cli.errors import DatabaseRefused, DatabaseUnreachable

    try:
        with runtime.connect("status") as connection:
            return probe(connection), None
    except (DatabaseUnreachable, DatabaseRefused) as error:
        return None, error


def _observe(runtime: "Runtime", health: "Health | None") -> "Observed":
    from helena_cli.cli.checks import Observed

    spool = runtime.spool
    return Observed(
        queue=spool.queue(),
        lanes=spool.lanes(),
        flushes=spool.flushes(),
        flusher=spool.flusher(),
        flusher_running=runtime.flusher_running(),
        health=health,
        now=time.time(),
        lost=spool.lost(),
    )


def _other_spools(paths: "Iterable[Path]") -> "list[tuple[Path, Queue | None]]":
    """What waits for other databases; None for a spool that cannot be read."""
    from helena_cli.batch.spool import Spool

    found: list[tuple[Path, Queue | None]] = []
    for path in paths:
        try:
            spool = Spool.open(path)
        except HelenaError:
            found.append((path, None))
            continue
        found.append((path, spool.queue()))
        spool.close()
    return found


def _document(
    target: str,
    seen: "Observed",
    away: HelenaError | None,
    others: "Sequence[tuple[Path, Queue | None]]",
    checks: "Sequence[Check]",
) -> dict[str, Any]:
    """The contract with other programs: keys may be added, never renamed."""
    from msgspec import to_builtins

    flusher = seen.flusher if seen.flusher_running else None
    flushes = to_builtins(seen.flushes)
    if flushes["last"]:
        flushes["last"]["at"] = render.instant(flushes["last"]["at"])
    return {
        "queue": {**to_builtins(seen.queue), "lost": seen.lost},
        "flusher": {
            "running": seen.flusher_running,
            "pid": flusher and flusher.pid,
            "since": flusher and render.instant(flusher.since),
            "heartbeat": flusher and render.instant(flusher.heartbeat),
        },
        "flushes": flushes,
        "database": {"target": target, **_database_document(seen.health, away)},
        "lanes": [
            {
                "table": lane.table,
                "reason": lane.reason,
                "since": render.instant(lane.since),
                "operations": lane.operations,
                "sqlstate": lane.sqlstate,
                "remedy": lane.remedy,
                "retry_at": render.instant(lane.retry_at),
            }
            for lane in seen.lanes
        ],
        "hosts": to_builtins(seen.health.hosts) if seen.health else [],
        "other_spools": [
            {"path": str(path), "queue": to_builtins(queue)} for path, queue in others
        ],
        "checks": to_builtins(checks),
    }


def _database_document(health: "Health | None", away: HelenaError | None) -> dict[str, Any]:
    from msgspec import to_builtins

    from helena_cli.database.health import Connections

    return {
        "reachable": health is not None,
        "reason": str(away) if away else None,
        "remedy": away.remedy if away else None,
        "server_version": health and health.server_version,
        "prepared": health and health.prepared,
        "response_ms": health and health.response_ms,
        "active_queries": health and health.active_queries,
        "longest_query_seconds": health and health.longest_query_seconds,
        "lock_waits": health and health.lock_waits,
        "idle_in_transaction": health and health.idle_in_transaction,
        "connections": to_builtins(health.connections if health else Connections()),
        "gin": to_builtins(health.gin) if health else [],
        "tables": [],
        "unknown": dict(health.unknown) if health else {},
    }


def _print_facts(runtime: "Runtime", seen: "Observed", away: HelenaError | None) -> None:
    queue, flushes, last = seen.queue, seen.flushes, seen.flushes.last
    kinds = f"{queue.insert:,} insert, {queue.update:,} update, {queue.message:,} message"
    facts: list[tuple[str, object]] = [("Target", runtime.target.label)]
    facts.extend(_database_facts(seen.health, away))
    facts.append(("Queue", f"{render.many(queue.total, 'operation')} ({kinds}), {_oldest(queue)}"))
    facts.append(("Spool", f"{runtime.spool.path}, {render.size(queue.spool_bytes)} in use"))
    facts.append(("Flusher", _flusher(seen)))
    facts.append(("Flushes", _flushes(flushes)))
    if last is not None:
        done = f"failed: {last.error}" if last.error else render.many(last.operations, "operation")
        ago = render.duration(max(0.0, seen.now - last.at))
        took = render.milliseconds(last.seconds * 1000)
        facts.append(("Last flush", f"{ago} ago, took {took}: {done}"))
    facts.append(("Dead letters", f"{queue.dead_letters:,}"))
    if seen.lost:
        text = f"{render.many(seen.lost, 'operation')}, when a damaged spool was repaired"
        facts.append(("Lost", render.cell(text, render.STYLES["critical"])))
    render.print_facts(facts)


def _database_facts(health: "Health | None", away: HelenaError | None) -> list[tuple[str, object]]:
    if away is not None:
        return [
            ("Database", render.cell(away, render.STYLES["critical"])),
            ("What to do", away.remedy),
        ]
    if health is None:
        return []
    missing = [("Tables", "Helena's tables are missing. Run: helena init")]
    return [
        *(missing if health.prepared is False else []),
        (
            "Database",
            f"PostgreSQL {health.server_version}, answers in "
            f"{render.milliseconds(health.response_ms)}; {_known(health.active_queries)} active "
            f"queries, {_known(health.lock_waits)} waiting for locks, "
            f"{_known(health.idle_in_transaction)} idle in transaction",
        ),
        (
            "Connections",
            f"{_known(health.connections.used)} of {_known(health.connections.max)} in use, "
            f"{_known(health.connections.helena)} by Helena",
        ),
        *((f"Unknown: {name}", reason) for name, reason in health.unknown.items()),
    ]


def _known(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _oldest(queue: "Queue") -> str:
    if queue.oldest_seconds is None:
        return "nothing waits"
    return f"the oldest {render.duration(queue.oldest_seconds)} old"


def _flushes(flushes: "Flushes") -> str:
    if not flushes.count + flushes.failures:
        return "none yet"
    return (
        f"{flushes.count:,} with {render.many(flushes.operations, 'operation')}, "
        f"{flushes.failures:,} failed; p50 {render.milliseconds(flushes.p50_ms)}, "
        f"p99 {render.milliseconds(flushes.p99_ms)}, "
        f"{render.number(flushes.operations_per_second)} operations/s"
    )


def _flusher(seen: "Observed") -> str:
    if not seen.flusher_running:
        return "none is running"
    if seen.flusher is None:
        return "running"
    since = render.local_time(seen.flusher.since)
    beat = render.duration(max(0.0, seen.now - seen.flusher.heartbeat))
    return f"running, process {seen.flusher.pid} since {since}, last sign of life {beat} ago"


def _print_lanes(seen: "Observed") -> None:
    waiting = [lane for lane in seen.lanes if lane.reason]
    if not waiting:
        return
    render.print_heading("Waiting tables (the others go on)")
    render.print_table(
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


def _print_others(others: "Sequence[tuple[Path, Queue | None]]") -> None:
    shown = [(path, queue) for path, queue in others if queue is None or queue.total]
    if not shown:
        return
    render.print_heading("Queues for other databases")
    render.print_table(
        ("operations", "spool"),
        ((f"{queue.total:,}" if queue else "unreadable", path) for path, queue in shown),
        right=("operations",),
    )


def _print_checks(checks: "Sequence[Check]") -> None:
    render.print_heading("Checks")
    render.print_table(
        ("status", "check", "what was found", "what to do"),
        (
            (
                render.cell(one.status, render.STYLES[one.status]),
                one.name,
                one.message,
                one.remedy,
            )
            for one in checks
        ),
    )
