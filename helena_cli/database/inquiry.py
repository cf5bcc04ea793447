"""Questions to a server that may be sick: each is bounded by itself, and answered or explained."""

import time
from collections.abc import Mapping
from typing import Any

import psycopg
from psycopg import ClientCursor, sql
from psycopg.rows import namedtuple_row

from helena_cli.database.connection import Connection

#: The most that one question may take, seconds; then the others still have their turn.
STATEMENT_SECONDS = 1.0

#: The most that it may wait for a lock, seconds.
LOCK_SECONDS = 0.3

# One message, one round trip. Not SET: a pooler would hand the settings to somebody else.
_BOUNDED = sql.SQL(
    "BEGIN READ ONLY; SET LOCAL statement_timeout = {}; SET LOCAL lock_timeout = {}; {}; COMMIT"
)
_STATEMENTS_BEFORE = 3

_REASONS = {
    "57014": "it took too long and was given up",
    "55P03": "it waits for a lock",
}

#: The reasons of a question that was not answered because something else is in the way.
HUNG = tuple(_REASONS.values())


class Inquiry:
    """Asks one question after the other on one connection, until its seconds are used up."""

    def __init__(self, connection: Connection, *, seconds: float) -> None:
        self.connection = connection
        self._cursor = ClientCursor(connection, row_factory=namedtuple_row)
        self._deadline = time.monotonic() + seconds
        #: Why there is no answer, by the name of the question.
        self.unknown: dict[str, str] = {}

    def all(
        self, name: str, query: str | sql.Composed, values: Mapping[str, object] | None = None
    ) -> list[Any] | None:
        """The rows; None, and a reason under `name`, when there is no answer."""
        left = self._deadline - time.monotonic()
        if left <= 0.02:
            self.unknown[name] = "there was no time left to ask"
            return None
        asked = sql.SQL(query) if isinstance(query, str) else query
        bounds = [int(min(limit, left) * 1000) for limit in (STATEMENT_SECONDS, LOCK_SECONDS)]
        try:
            self._cursor.execute(_BOUNDED.format(*bounds, asked), values or {})
            for _ in range(_STATEMENTS_BEFORE):
                self._cursor.nextset()
            return self._cursor.fetchall()
        except UnicodeError:
            # What other sessions run may be in any encoding; this question is over all the same.
            self.unknown[name] = "the answer holds text in another encoding"
        except psycopg.Error as error:
            self.unknown[name] = self._reason(error)
        return None

    def one(
        self, name: str, query: str | sql.Composed, values: Mapping[str, object] | None = None
    ) -> Any:
        """The only row, or None and a reason under `name`."""
        rows = self.all(name, query, values)
        return rows[0] if rows else None

    def response_ms(self) -> float | None:
        """One round trip; the best of three, for the first may wait for this client."""
        times = []
        for _ in range(3):
            started = time.perf_counter()
            if self.all("response_ms", "SELECT 1") is None:
                return None
            times.append((time.perf_counter() - started) * 1000)
        return min(times)

    def _reason(self, error: psycopg.Error) -> str:
        if self.connection.closed:
            return "the connection was lost"
        try:
            self.connection.execute("ROLLBACK")
        except psycopg.Error:
            return "the connection was lost"
        text = error.diag.message_primary or str(error).strip()
        if error.sqlstate == "42501":
            return f"{text}: needs pg_monitor" if "function" in text else text
        return _REASONS.get(error.sqlstate or "", text)
