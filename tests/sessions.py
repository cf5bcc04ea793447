"""Sessions that do to a database what it suffers from: they hold locks, wait for them, and run."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import psycopg

from tests.hosts import wait_until

Session = psycopg.Connection[tuple[object, ...]]


@contextmanager
def session(dsn: str, application: str = "other") -> Iterator[Session]:
    """A connection in autocommit mode, closed at the end."""
    with psycopg.connect(dsn, autocommit=True, application_name=application) as connection:
        yield connection


@contextmanager
def stuck(connection: Session, statement: str) -> Iterator[int]:
    """Runs a statement that does not end by itself, until the block ends; its pid."""

    def run() -> None:
        # A login may be ended, a statement cancelled, or it gets what it waited for.
        try:
            connection.execute(statement.encode())
        except psycopg.Error as error:
            ended.append(error)

    ended: list[psycopg.Error] = []
    thread = threading.Thread(target=run, name="stuck")
    thread.start()
    try:
        yield connection.info.backend_pid
    finally:
        connection.cancel_safe()
        thread.join(30)


@contextmanager
def running(dsn: str, statement: str) -> Iterator[int]:
    """A session that runs a statement until the block ends; its pid."""
    with session(dsn) as connection, stuck(connection, statement) as pid:
        yield pid


@contextmanager
def holding(dsn: str, statement: str) -> Iterator[int]:
    """A session that is idle in a transaction after this statement, until the block ends."""
    with session(dsn) as connection, connection.transaction(force_rollback=True):
        connection.execute(statement.encode())
        yield connection.info.backend_pid


@contextmanager
def emergency(dsn: str, *, readers: int = 20) -> Iterator[tuple[int, int]]:
    """A lock on `messages` that nobody gives back, an ALTER behind it, and readers behind both.

    The pids of the first two.
    """
    with (
        ExitStack() as stack,
        session(dsn, "look") as look,
        holding(dsn, "LOCK TABLE messages IN ACCESS EXCLUSIVE MODE") as root,
    ):
        alter = stack.enter_context(running(dsn, "ALTER TABLE messages ADD COLUMN more int"))
        await_waiting(look, 1)
        for _ in range(readers):
            stack.enter_context(running(dsn, "SELECT count(*) FROM messages"))
        await_waiting(look, readers + 1)
        yield root, alter


def await_waiting(connection: Session, count: int) -> None:
    """Wait until so many sessions of this database wait for a lock."""

    def waiting() -> bool:
        query = (
            "SELECT count(DISTINCT pid) FROM pg_locks JOIN pg_stat_activity USING (pid)"
            " WHERE NOT granted AND datname = current_database()"
        )
        return connection.execute(query).fetchone() == (count,)

    wait_until(waiting, f"{count} sessions wait for a lock")
