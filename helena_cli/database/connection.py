"""The one way to connect to the database, and what its errors mean for a person."""

import math
import re
from collections.abc import Mapping
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import TupleRow

from helena_cli.database.target import Target, resolve
from helena_cli.errors import DatabaseRefused, DatabaseUnreachable, HelenaError, SchemaMissing

__all__ = ["Connection", "Target", "connect", "resolve", "translate"]

Connection = psycopg.Connection[TupleRow]

#: A line that fell silent is noticed within a minute, also by a client that only waits. Seconds,
#: but tcp_user_timeout in ms. libpq leaves out what a Unix socket or this system does not know.
_KEEPALIVES: Mapping[str, int] = {
    "keepalives": 1,
    "keepalives_idle": 20,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}


def connect(
    target: Target, *, application: str, autocommit: bool = True, database: str | None = None
) -> Connection:
    """Open a connection, called `helena APPLICATION` in pg_stat_activity.

    `database` names another one of the same server. It leaves no state in the session and sends no
    `options`, so it works through PgBouncer in transaction mode. Raises DatabaseUnreachable with
    the remedy for its cause.
    """
    if not target.dsn and target.embedded:
        raise RuntimeError("the embedded PostgreSQL was not started")
    given = conninfo_to_dict(target.dsn)
    parameters: dict[str, Any] = {k: v for k, v in _KEEPALIVES.items() if k not in given}
    if database is not None:
        parameters["dbname"] = database
    try:
        return psycopg.connect(
            target.dsn,
            autocommit=autocommit,
            prepare_threshold=None,
            application_name=f"helena {application}",
            client_encoding="utf8",
            # libpq counts whole seconds and takes 1 for 2.
            connect_timeout=max(2, math.ceil(target.connect_timeout)),
            **parameters,
        )
    except (psycopg.Error, UnicodeError) as error:
        # A UnicodeError is a host's name that no resolver can be asked for.
        secrets = [str(v) for k, v in given.items() if v and ("password" in k or "secret" in k)]
        raise _unreachable(target.label, str(error), secrets) from None


#: Releases differ in the words, and PgBouncer has its own.
_SLOTS_TAKEN = (
    r"too many clients already|too many connections|connection slots are reserved"
    r"|no more connections allowed"
)


_NO_ANSWER = "timeout expired|timed out"


def slots_are_taken(error: HelenaError) -> bool:
    """Whether a connection failed because all of them are in use."""
    return re.search(_SLOTS_TAKEN, str(error)) is not None


def nobody_answered(error: HelenaError) -> bool:
    """Whether a connection failed because there was no answer in time."""
    return re.search(_NO_ANSWER, str(error)) is not None


#: Why a connection failed, by what libpq, the server or PgBouncer say. There is no SQLSTATE then.
#: Anything else, such as a server that speaks another language, gets the general remedy.
_CAUSES: tuple[tuple[str, str], ...] = (
    (
        _SLOTS_TAKEN,
        "All connections are taken. See who holds them with helena status; free them with "
        "helena clear-locks or raise max_connections. Queued operations wait in the spool.",
    ),
    (
        r"password authentication failed|no password supplied|SASL authentication failed"
        r"|authentication failed for user|empty password",
        "Check user and password: in HELENA_DSN, PGPASSWORD or ~/.pgpass (mode 0600).",
    ),
    (
        r'database ".*" does not exist|no such database',
        "Create the database (createdb NAME) or mend its name in the DSN.",
    ),
    (
        r'role ".*" does not exist|no such user|not permitted to log in',
        "Create the role (CREATE ROLE name LOGIN) or mend the user in the DSN.",
    ),
    (
        r"permission denied for database",
        "Let a superuser run: GRANT CONNECT ON DATABASE name TO role.",
    ),
    (
        r"SSL was required|SSL error|no encryption|requires a valid client certificate"
        r"|certificate|SSL negotiation",
        "This concerns TLS: check sslmode, sslrootcert and sslcert in the DSN, and the hostssl "
        "lines of the server's pg_hba.conf.",
    ),
    (
        r"no pg_hba.conf entry|pg_hba.conf rejects",
        "The server does not let this user in from this host: add a line to its pg_hba.conf.",
    ),
    (
        r"resolve host|translate host name|Name or service not known|idna",
        "The name of the host is unknown: mend it in the DSN, or look at DNS and the network.",
    ),
    (
        r"Connection refused|No such file or directory",
        "No server listens there: start PostgreSQL, or mend host and port in the DSN.",
    ),
    (
        rf"{_NO_ANSWER}|Network is unreachable|No route to host",
        "Nothing answered in time: look at the network, a firewall or an overloaded server; "
        "[database] connect_timeout says how long to wait.",
    ),
    (
        r"starting up|shutting down|in recovery mode|not (?:currently |yet )?accepting connections",
        "The server is starting, stopping or closed for now: wait, or ask its administrator.",
    ),
    (
        r"session is read-only|hot standby mode|not read-only|standby",
        "None of the hosts fits target_session_attrs: is there a primary server among them?",
    ),
    (
        r"server closed the connection|Connection reset|unexpectedly|login has been failing",
        "The server, or a pooler before it, hung up: look at its log, and whether it is running.",
    ),
)

_GENERAL = "Check the address of the database, and its log; helena status tries again."


def _unreachable(label: str, text: str, secrets: list[str]) -> DatabaseUnreachable:
    # The cause first: the password may be "refused".
    remedy = next((cure for cause, cure in _CAUSES if re.search(cause, _one_line(text))), _GENERAL)
    for secret in secrets:
        text = text.replace(secret, "***")
    return DatabaseUnreachable(
        f"The database {label} cannot be reached: {_one_line(text)}", remedy=remedy
    )


def _one_line(text: str) -> str:
    """What happened, without libpq's advice and without the list of all attempts."""
    text = text.partition("\nMultiple connection attempts failed")[0]
    text = re.sub(r"\n\tIs the server running .*\?", "", text)
    text = re.sub(r"^connection (?:failed|is bad): ", "", text)
    return " ".join(text.split())


def translate(error: psycopg.Error) -> HelenaError:
    """What an error of a statement means: the one place where the driver's errors become ours."""
    state = error.sqlstate
    text = error.diag.message_primary or _one_line(str(error))
    if _is_lost(error):
        return DatabaseUnreachable(
            f"The connection to the database was lost: {text}",
            remedy="Look at the server and its log, then run the command again. What is queued "
            "stays in the spool.",
        )
    if state in ("42P01", "3F000") and re.search(r'\bhelena[."]', text):
        return SchemaMissing(
            f"This database has not been prepared for Helena: {text}.", remedy="Run: helena init."
        )
    remedy = _REMEDIES.get(state or "") or _REMEDIES.get((state or "")[:2]) or _UNFORESEEN
    if state == "42501":
        remedy = _grant(text)
    return DatabaseRefused(f"The database refused: {text}", remedy=remedy, sqlstate=state)


def _is_lost(error: psycopg.Error) -> bool:
    state = error.sqlstate
    if state is None:
        # Not the driver's own refusals, such as a value that it cannot adapt.
        return isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
    return state.startswith("08") or state in ("57P01", "57P02", "57P03", "57P04", "57P05")


_UNFORESEEN = "The words are PostgreSQL's own; its log may say more. With -v there is a traceback."

#: By SQLSTATE, or by its class of two characters.
_REMEDIES: Mapping[str, str] = {
    "25006": "This server is read-only, perhaps a standby: name the primary in the DSN, or several "
    "hosts with target_session_attrs=read-write.",
    "57014": "The statement was cancelled, by somebody or by a time limit. See what holds it up "
    "with helena status; free it with helena clear-locks.",
    "55P03": "Somebody holds a lock. See who with helena status; free it with helena clear-locks.",
    "40": "Two transactions got in each other's way: run the command again.",
    "53100": "The disk of the database server is full: make room there.",
    "53": "The database server is short of memory, disk or connections: look at its log.",
    "42P01": "Create the table, or mend its name. Helena's own tables are made by helena init.",
    "42703": "Add the column to the table, or mend its name.",
    "3F000": "Create the schema, or mend its name.",
    "23": "The row breaks a rule of the table: mend the row.",
    "22": "A value does not fit its column: mend the value.",
}


def _grant(text: str) -> str:
    """Which GRANT is missing, as far as the message tells."""
    found = re.search(r"permission denied for (\w+) (\S+)", text)
    kind, name = found.groups() if found else ("", "")
    rights = {
        "table": f"SELECT, INSERT, UPDATE ON TABLE {name}",
        "relation": f"SELECT, INSERT, UPDATE ON TABLE {name}",
        "sequence": f"USAGE ON SEQUENCE {name}",
        "schema": f"USAGE ON SCHEMA {name}",
        # Not CONNECT: a statement has come so far.
        "database": f"CREATE ON DATABASE {name}",
        "function": f"EXECUTE ON FUNCTION {name}",
    }
    if kind not in rights:
        return "The role of the DSN may not do this: ask the owner or a superuser."
    return f"Let the owner or a superuser run: GRANT {rights[kind]} TO the role of the DSN."
