"""One look over one connection: every question in its turn, each finding published at once."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from msgspec.structs import replace

from helena_cli.database import activity, gin, hosts, schema, tables
from helena_cli.database.connection import Connection
from helena_cli.database.health import NOTHING, Health
from helena_cli.database.inquiry import HUNG, Inquiry

#: For all questions together.
SECONDS = 2.0

NO_ANSWER = "it did not answer in time"

Publish = Callable[[Health], None]
_Steps = Mapping[str, Callable[[Health], Mapping[str, Any]]]

#: What any database of the server can tell, with the fields that it fills.
_SESSIONS: Mapping[str, tuple[str, ...]] = {
    "active_queries": (
        *("active_queries", "longest_query_seconds", "longest_query"),
        *("idle_in_transaction", "longest_idle_seconds"),
    ),
    "lock_waits": ("lock_waits", "waiting", "blocking"),
    "locks": ("locks",),
    "connections": ("connections", "holders"),
}


def _ignore(_: Health) -> None:
    """Nobody wants to know before the end."""


def probe(
    connection: Connection,
    watched: Iterable[str] = (),
    *,
    seconds: float = SECONDS,
    publish: Publish = _ignore,
) -> Health:
    """Ask everything, of Helena's tables and the `watched` ones. Never raises for a no.

    `publish` is called with what is known so far.
    """
    inquiry = Inquiry(connection, seconds=seconds)
    name = inquiry.one("database", "SELECT current_database()::text AS name")
    database = name.name if name else connection.info.dbname
    inquiry.unknown.clear()
    names = {*schema.TABLES, "helena.spool_position", *watched}

    def all_names(health: Health) -> set[str]:
        return names | {row.table for host in health.hosts for row in host.positions}

    steps: _Steps = {
        "response_ms": lambda _: {"response_ms": inquiry.response_ms()},
        **_sessions(inquiry, database),
        "hosts": lambda health: hosts.prepared(inquiry, health),
        "tables": lambda health: tables.states(inquiry, all_names(health), health),
        "gin": lambda health: gin.pending(inquiry, all_names(health), health),
    }
    return _run(inquiry, NOTHING, steps, publish)


def probe_from_elsewhere(
    connection: Connection, database: str, *, seconds: float = SECONDS, publish: Publish = _ignore
) -> Health:
    """What another database of the same server can tell of this one."""
    inquiry = Inquiry(connection, seconds=seconds)
    known = replace(NOTHING, via=connection.info.dbname)
    return _run(inquiry, known, _sessions(inquiry, database), publish)


def completed(own: Health, elsewhere: Health | None) -> Health:
    """The own look, with what only the other database could tell, and who is in the way."""
    if elsewhere is not None:
        asked = [name for name in _SESSIONS if name in own.unknown]
        told = [name for name in asked if name not in elsewhere.unknown]
        fields = {field: getattr(elsewhere, field) for name in told for field in _SESSIONS[name]}
        unknown = {name: reason for name, reason in own.unknown.items() if name not in told}
        own = replace(own, **fields, unknown=unknown, via=elsewhere.via)
    lock = own.catalog_lock
    if lock is None:
        return own
    unknown = {
        name: f"{lock.relation} is {lock.reason}" if reason in (*HUNG, NO_ANSWER) else reason
        for name, reason in own.unknown.items()
    }
    return replace(own, unknown=unknown)


def _sessions(inquiry: Inquiry, database: str) -> _Steps:
    return {
        "active_queries": lambda _: activity.queries(inquiry, database),
        "lock_waits": lambda _: activity.waits(inquiry, database),
        "locks": lambda _: activity.locks(inquiry, database),
        "connections": lambda _: activity.connections(inquiry, database),
    }


def _run(inquiry: Inquiry, health: Health, steps: _Steps, publish: Publish) -> Health:
    version = inquiry.connection.info.parameter_status("server_version")
    health = replace(health, server_version=version or "")
    todo = list(steps)
    for name, step in steps.items():
        changes = step(health)
        todo.remove(name)
        unknown = {**dict.fromkeys(todo, NO_ANSWER), **inquiry.unknown}
        health = replace(health, unknown=unknown, **changes)
        publish(health)
    return health
