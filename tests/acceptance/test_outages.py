"""The database or the line to it fails while processes write: everything arrives exactly once."""

import random
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from helena_cli import config
from helena_cli.database import embedded, schema
from helena_cli.runtime import Runtime
from tests import databases
from tests.cluster import Cluster
from tests.conftest import _installed_binaries
from tests.hosts import Host, Producer, wait_until
from tests.proxy import Proxy

pytestmark = [pytest.mark.acceptance, pytest.mark.postgres]

ADD = """
import sys
from helena_cli import add_operation
first, count = int(sys.argv[1]), int(sys.argv[2])
for n in range(first, first + count):
    add_operation("insert", "numbers", {"n": n})
"""

#: Adds one number and stays.
STAY = """
import sys
from helena_cli import add_operation
add_operation("insert", "numbers", {"n": int(sys.argv[1])})
sys.stdin.read()
"""


@pytest.fixture
def producer(far_host: Host) -> Iterator[Producer]:
    with ExitStack() as stack:
        producer = Producer(far_host, HELENA_BATCH_SIZE="20", HELENA_BATCH_INTERVAL="0.05")
        stack.enter_context(producer.process)
        stack.callback(producer.process.kill)
        yield producer


def drained(host: Host) -> Host:
    """The host after another process has written what was left."""
    with host.runtime() as runtime:
        assert runtime.engine.flush(60)
    return host


def test_a_line_that_is_cut_again_and_again_loses_and_doubles_nothing(
    far_host: Host, proxy: Proxy, producer: Producer
):
    seed = random.randrange(10**6)
    print("seed", seed)
    chance = random.Random(seed)
    for _ in range(25):
        producer.produce(chance.randrange(1, 60))
        proxy.cut()
    count = producer.finish()
    drained(far_host).assert_written_once(count)


def test_a_line_that_falls_silent_and_then_breaks_loses_and_doubles_nothing(
    far_host: Host, proxy: Proxy, producer: Producer
):
    for _ in range(3):
        producer.produce(60)
        proxy.stalled = True
        producer.produce(60)
        proxy.cut()
        proxy.stalled = False
    count = producer.finish()
    drained(far_host).assert_written_once(count)


def test_a_lost_answer_to_commit_loses_and_doubles_nothing(
    far_host: Host, proxy: Proxy, producer: Producer
):
    for _ in range(5):
        producer.produce(30)
        proxy.drop_next_answer(b"COMMIT")
        producer.produce(30)
        assert proxy.dropped.wait(60)
    count = producer.finish()
    drained(far_host).assert_written_once(count)


def test_a_process_that_dies_without_an_answer_to_commit_loses_and_doubles_nothing(
    far_host: Host, proxy: Proxy
):
    for number in range(3):
        proxy.drop_next_answer(b"COMMIT")
        with far_host.start(STAY, number) as process:
            assert proxy.dropped.wait(60)
            process.send_signal(signal.SIGKILL)
    assert drained(far_host).run(ADD, 3, 1).returncode == 0
    far_host.assert_written_once(4)


@pytest.fixture(scope="module")
def server() -> Iterator[Cluster]:
    """A running server of this module's own, which asks for a password on its port."""
    binaries = embedded.binaries() or _installed_binaries()
    if binaries is None:
        pytest.skip("There are no PostgreSQL binaries for a server of these tests' own.")
    cluster = Cluster(binaries, tcp=True)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def database(server: Cluster) -> Iterator[str]:
    """The name of a database on it with Helena's tables."""
    name = f"helena_{secrets.token_hex(6)}"
    with psycopg.connect(server.dsn, autocommit=True) as connection:
        databases.create(connection, name)
    with psycopg.connect(make_conninfo(server.dsn, dbname=name), autocommit=True) as connection:
        schema.initialise(connection)
    yield name
    with psycopg.connect(server.dsn, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def test_a_server_that_crashes_under_load_loses_and_doubles_nothing(
    server: Cluster, database: str, state_dir: Path
):
    outside = make_conninfo(server.tcp_dsn, dbname=database)
    inside = make_conninfo(server.dsn, dbname=database)
    host = Host(outside, state_dir, admin=inside)
    host.close()
    producer = Producer(host, HELENA_BATCH_SIZE="20", HELENA_BATCH_INTERVAL="0.05")
    with producer.process:
        for _ in range(3):
            producer.produce(100)
            server.stop("immediate")
            producer.produce(100)
            server.start()
        count = producer.finish()
    host = Host(outside, state_dir, admin=inside)
    drained(host).assert_written_once(count)
    host.close()


def complaint(result: "subprocess.CompletedProcess[str]", waiting: int) -> str:
    """What a script says that cannot write now; it ends well all the same."""
    assert (result.returncode, result.stdout) == (0, "")
    assert f"{waiting} operations wait" in result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


def test_with_a_wrong_password_all_waits_until_it_is_right(
    server: Cluster, database: str, state_dir: Path
):
    host = Host(
        make_conninfo(server.tcp_dsn, dbname=database, password="sesame"),
        state_dir,
        admin=make_conninfo(server.dsn, dbname=database),
    )
    told = complaint(host.run(ADD, 0, 2), 2)
    assert "password" in told
    assert "sesame" not in told
    host.sql("ALTER ROLE postgres PASSWORD 'sesame'")
    assert host.run(ADD, 2, 1).stderr == ""
    host.assert_written_once(3)
    host.sql(f"ALTER ROLE postgres PASSWORD '{server.password}'")
    host.close()


def test_without_database_or_tables_all_waits_until_there_are_some(
    server: Cluster, state_dir: Path
):
    name = make_conninfo(server.dsn, dbname="absent")
    host = Host(name, state_dir, admin=server.dsn)
    assert '"absent" does not exist' in complaint(host.run(ADD, 0, 2), 2)
    host.sql("CREATE DATABASE absent")
    host.close()
    host = Host(name, state_dir)
    assert "helena init" in complaint(host.run(ADD, 2, 1), 3)
    schema.initialise(host.admin)
    assert host.run(ADD, 3, 1).stderr == ""
    host.assert_written_once(4)
    host.close()


def put_back(copies: Path, folder: Path) -> None:
    """Restore a backup into the files that are there, as `cp` does: they stay the same inodes."""
    for copy in copies.iterdir():
        shutil.copyfile(copy, folder / copy.name)


@pytest.mark.parametrize("names", ["*.spool", "*.spool*"])
def test_an_older_copy_of_the_spool_stops_and_says_so(
    helena_dsn: str, state_dir: Path, tmp_path: Path, names: str
):
    host = Host(helena_dsn, state_dir)
    assert host.run(ADD, 0, 10).stderr == ""
    for path in state_dir.glob(names):
        shutil.copyfile(path, tmp_path / path.name)
    assert host.run(ADD, 10, 10).stderr == ""
    put_back(tmp_path, state_dir)
    host.run(ADD, 20, 10)
    assert host.numbers() == list(range(20))
    with host.runtime() as runtime:
        assert runtime.engine.flush(60)
        (lane,) = runtime.spool.lanes()
    assert lane.reason is not None
    assert "copy" in lane.reason
    # All that was accepted since is still there: nothing was skipped as written already.
    assert lane.operations == host.law().spooled == 10
    host.close()


def test_the_flusher_survives_that_its_connection_is_terminated(far_host: Host):
    with far_host.runtime() as runtime:
        runtime.engine.add_operation("insert", "numbers", {"n": 0})
        assert runtime.engine.flush(60)
        (pid,) = wait_until(
            lambda: [
                pid
                for (pid,) in far_host.sql(
                    "SELECT pid FROM pg_stat_activity WHERE application_name = 'helena flush'"
                    " AND datname = current_database()"
                )
            ],
            "the flusher's connection",
        )
        far_host.sql(f"SELECT pg_terminate_backend({pid}, 5000)")
        runtime.engine.add_operation("insert", "numbers", {"n": 1})
        assert runtime.engine.flush(60)
    far_host.assert_written_once(2)


@pytest.mark.skipif(not embedded.available(), reason="the embedded PostgreSQL is not installed")
def test_an_embedded_server_that_was_killed_is_started_again(state_dir: Path):
    settings = config.load(environ={"HELENA_STATE_DIR": str(state_dir)})
    message = {"sender": "a", "message_type": "b", "content": "c"}
    with Runtime(settings) as runtime:
        runtime.engine.add_operation("message", "messages", {"id": "1", **message})
        assert runtime.engine.flush(90)
        with runtime.connect("test") as connection:
            postmaster = psutil.Process(connection.info.backend_pid).parent()
        assert postmaster is not None
        postmaster.kill()
        postmaster.wait(30)
        runtime.engine.add_operation("message", "messages", {"id": "2", **message})
        assert runtime.engine.flush(90)
        with runtime.connect("test") as connection:
            found = connection.execute("SELECT id FROM messages ORDER BY id").fetchall()
    assert found == [("1",), ("2",)]
