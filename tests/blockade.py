"""A database in which sessions hold each other up: made by a test, taken down at its end."""

import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from tests import databases
from tests.hosts import wait_until

Session = psycopg.Connection[tuple[Any, ...]]


class Waiter:
    """A statement in a thread of its own, on a session of its own or on a given one."""

    def __init__(self, session: Session, statement: str) -> None:
        self.session = session
        self.pid = session.info.backend_pid
        self.error: psycopg.Error | None = None
        self.done = threading.Event()
        self._statement = statement
        self.thread = threading.Thread(target=self._run, name=f"waiter {self.pid}")
        self.thread.start()

    def _run(self) -> None:
        try:
            self.session.execute(self._statement.encode())
        except psycopg.Error as error:
            self.error = error
        self.done.set()

    @property
    def succeeded(self) -> bool:
        """Whether the statement came to its end; waits for that."""
        wait_until(self.done.is_set, f"the statement of {self.pid} ends", limit=20)
        return self.error is None


class Blockade:
    """Sessions of one database, which has a table `goods`. A context manager: it ends them all."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.admin: Session = psycopg.connect(dsn, autocommit=True, application_name="the test")
        self.sessions: list[Session] = []
        self.waiters: list[Waiter] = []
        self.roles: list[str] = []
        # So that a test which fails does not hang as well.
        self.admin.execute("SET lock_timeout = '10s'")
        self.admin.execute(
            "CREATE TABLE goods (id int PRIMARY KEY, name text);"
            "INSERT INTO goods SELECT n, 'a' FROM generate_series(1, 10) n;"
            "GRANT SELECT, INSERT, UPDATE ON goods TO PUBLIC"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for session in self.sessions:
            if not session.closed:
                self.admin.execute("SELECT pg_terminate_backend(%s)", [session.info.backend_pid])
        for waiter in self.waiters:
            waiter.thread.join(20)
        for session in self.sessions:
            session.close()
        for role in self.roles:
            name = sql.Identifier(role)
            self.admin.execute(sql.SQL("DROP OWNED BY {0} CASCADE; DROP ROLE {0}").format(name))
        self.admin.close()

    def role(self, options: str = "", *grants: str) -> str:
        """A new role that may log in; `grants` are roles that it becomes a member of."""
        name = f"helena_test_{secrets.token_hex(4)}"
        self.admin.execute(f"CREATE ROLE {name} LOGIN {options}".encode())
        self.roles.append(name)
        for grant in grants:
            self.admin.execute(f"GRANT {grant} TO {name}".encode())
        return name

    def session(self, *statements: str, autocommit: bool = False, **parameters: str) -> Session:
        """A session after these statements: idle in a transaction, unless `autocommit`."""
        parameters.setdefault("application_name", "a program")
        session = psycopg.connect(make_conninfo(self.dsn, **parameters), autocommit=autocommit)
        self.sessions.append(session)
        for statement in statements:
            session.execute(statement.encode())
        return session

    def run(self, statement: str, *, session: Session | None = None, **parameters: str) -> Waiter:
        """A statement that does not end soon; when it returns, that waits, sleeps or runs."""
        waiter = Waiter(session or self.session(autocommit=True, **parameters), statement)
        self.waiters.append(waiter)
        wait_until(lambda: self._at_work(waiter), f"{statement} has begun")
        return waiter

    def _at_work(self, waiter: Waiter) -> bool:
        query = (
            "SELECT wait_event_type = 'Lock' OR query LIKE '%%sleep%%' FROM pg_stat_activity"
            " WHERE pid = %s AND state = 'active'"
        )
        return waiter.done.is_set() or self.admin.execute(query, [waiter.pid]).fetchone() == (True,)

    def pids(self) -> set[int]:
        """All sessions of the server that belong to programs."""
        query = (
            "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend'"
            " AND application_name NOT LIKE 'helena %'"
        )
        return {pid for (pid,) in self.admin.execute(query)}

    def sql(self, query: str, values: Mapping[str, object] | None = None) -> list[tuple[Any, ...]]:
        """The rows of a question of the test's own."""
        cursor = self.admin.execute(query.encode(), values)
        return cursor.fetchall() if cursor.description else []


@contextmanager
def fresh_database(server: str, encoding: str = "UTF8") -> Iterator[str]:
    """An empty database on a server, dropped at the end."""
    name = f"helena_{secrets.token_hex(6)}"
    with psycopg.connect(server, autocommit=True) as admin:
        databases.create(admin, name, encoding=encoding)
        try:
            yield make_conninfo(server, dbname=name)
        finally:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def emergency(
    blockade: Blockade, lock: str, *, readers: int = 20
) -> tuple[int, Waiter, list[Waiter]]:
    """A session idle in a transaction with a lock, an ALTER behind it, readers behind both."""
    root = blockade.session(f"LOCK TABLE goods IN {lock} MODE").info.backend_pid
    alter = blockade.run("ALTER TABLE goods ADD COLUMN note text")
    return root, alter, [blockade.run("SELECT count(*) FROM goods") for _ in range(readers)]


def done(document: Any) -> list[tuple[int | None, str, str]]:
    """What `helena clear-locks --json` says that it did: pid, action, result."""
    return [(one["pid"], one["action"], one["result"]) for one in document["applied"]]
