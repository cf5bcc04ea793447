"""Fixtures that need a database."""

import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.cluster import Cluster
from tests.ports import free_port
from tests.writing import Desk


@pytest.fixture
def desk(helena_dsn: str) -> Iterator[Desk]:
    """Operations on their way into a database with Helena's tables."""
    desk = Desk(helena_dsn)
    yield desk
    desk.close()


@pytest.fixture
def pgbouncer(own_server: Cluster, state_dir: Path) -> Iterator[str]:
    """The conninfo of a PgBouncer in transaction mode with one server connection."""
    program = shutil.which("pgbouncer")
    if program is None:
        pytest.skip("PgBouncer is not installed.")
    own_server.start()
    port = free_port()
    upstream = make_conninfo(own_server.tcp_dsn, sslmode="disable")
    parameters = conninfo_to_dict(upstream)
    config = state_dir / "pgbouncer.ini"
    config.write_text(
        f"[databases]\npostgres = host=127.0.0.1 port={own_server.port} user=postgres "
        f"password={parameters['password']}\n"
        "[pgbouncer]\npool_mode = transaction\ndefault_pool_size = 1\nmax_client_conn = 4\n"
        f"auth_type = any\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
    )
    as_user: dict[str, Any] = {}
    if own_server.account:
        as_user = {"user": "nobody", "group": pwd.getpwnam("nobody").pw_gid, "extra_groups": []}
        state_dir.chmod(0o755)
        config.chmod(0o644)
    with (
        (state_dir / "pgbouncer.log").open("w") as log,
        subprocess.Popen([program, config], stdout=log, stderr=log, **as_user) as process,
    ):
        dsn = make_conninfo(host="127.0.0.1", port=port, dbname="postgres", user="x")
        try:
            _await_listening(port)
            yield dsn
        finally:
            process.terminate()
            process.wait(20)


def _await_listening(port: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    pytest.fail("PgBouncer does not listen.")
