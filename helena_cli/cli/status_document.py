"""What `helena status --json` prints: a contract. Keys may be added, never renamed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec import to_builtins

from helena_cli.batch import report
from helena_cli.batch.ledger import Lane, Queue
from helena_cli.batch.report import instant
from helena_cli.cli.checks import Check, Observed
from helena_cli.database.health import NOTHING


def document(
    target: str,
    seen: Observed,
    others: Sequence[tuple[Path, Queue | None]],
    checks: Sequence[Check],
) -> dict[str, Any]:
    """One look, with everything in it."""
    return {
        **report.document(
            seen.queue, seen.lost, seen.flusher, running=seen.flusher_running, flushes=seen.flushes
        ),
        "database": {"target": target, **_database(seen)},
        "lanes": [_lane(lane) for lane in seen.lanes],
        "hosts": to_builtins(seen.health.hosts) if seen.health else [],
        "other_spools": [
            {"path": str(path), "queue": to_builtins(queue)} for path, queue in others
        ],
        "checks": to_builtins(checks),
    }


def _database(seen: Observed) -> dict[str, Any]:
    health = to_builtins(seen.health or NOTHING)
    # They have a key of their own at the top.
    del health["hosts"]
    return {
        "reachable": seen.away is None,
        "reason": None if seen.away is None else str(seen.away),
        "remedy": None if seen.away is None else seen.away.remedy,
        **health,
        "server_version": health["server_version"] or None,
    }


def _lane(lane: Lane) -> dict[str, Any]:
    return {
        "table": lane.table,
        "reason": lane.reason,
        "since": instant(lane.since),
        "operations": lane.operations,
        "sqlstate": lane.sqlstate,
        "remedy": lane.remedy,
        "retry_at": instant(lane.retry_at),
    }
