"""Nothing private gets out, and nobody else's file gets in: planted secrets, links and races."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import quote

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from helena_cli import config
from helena_cli.batch import claims
from helena_cli.batch.claims import Claims, Unusable
from helena_cli.database import schema, target
from helena_cli.documents import scan
from helena_cli.documents.filter import Filter
from helena_cli.documents.json_files import JsonFiles
from helena_cli.documents.scan import Found
from helena_cli.errors import HelenaError
from helena_cli.settings import DocumentSettings
from tests.cluster import Cluster
from tests.commands import Program
from tests.hosts import wait_until

pytestmark = pytest.mark.postgres

#: Recognised in whatever spelling the rest of the password takes.
PLANTED = "pl4nted"
PASSWORD = f"{PLANTED}@p/w:o#r?d%41 '\\{PLANTED}"

COMMANDS = (
    ("process-pending",),
    ("status",),
    ("dead-letters", "list"),
    ("clear-locks", "--no-vacuum"),
    ("stop-realtime", "--dry-run"),
    ("init",),
    ("service", "install", "--yes"),
    ("enqueue", "insert", "documents"),
)


@pytest.fixture
def guarded(own_server: Cluster) -> Iterator[str]:
    """A conninfo of a database with Helena's tables that asks for the planted password."""
    own_server.start()
    with psycopg.connect(own_server.dsn, autocommit=True) as admin:
        schema.initialise(admin)
        admin.execute(
            psycopg.sql.SQL("ALTER ROLE postgres PASSWORD {}").format(psycopg.sql.Literal(PASSWORD))
        )
    yield make_conninfo(own_server.tcp_dsn, password=PASSWORD)


def uri(conninfo: str, *, escaped: bool = True) -> str:
    """The same address as a URI."""
    given = {key: str(value) for key, value in conninfo_to_dict(conninfo).items()}
    password = quote(given["password"], safe="") if escaped else given["password"]
    place = f"{given['host']}:{given['port']}/{given['dbname']}"
    return f"postgresql://{given['user']}:{password}@{place}"


def files_below(folder: Path) -> Iterator[bytes]:
    """Names and contents of everything in a folder."""
    for path in folder.rglob("*"):
        yield os.fsencode(path)
        if path.is_file() and not path.is_symlink():
            yield path.read_bytes()


def processes() -> Iterator[bytes]:
    """Command lines, titles and names of threads of everything that runs here."""
    for path in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "comm"):
            with suppress(OSError):
                yield (path / name).read_bytes()
        with suppress(OSError):
            for thread in (path / "task").iterdir():
                yield (thread / "comm").read_bytes()


def assert_nowhere(*texts: bytes) -> None:
    for text in texts:
        assert PLANTED.encode() not in text, text[:2000].decode(errors="replace")


def addresses(conninfo: str) -> dict[str, str]:
    """The right one in two spellings, and all the ways in which it can be wrong."""
    broken = uri(conninfo, escaped=False)
    return {
        "right": conninfo,
        "right, as a URI": uri(conninfo),
        "wrong password": make_conninfo(conninfo, password=f"{PASSWORD}x"),
        "nobody there": make_conninfo(conninfo, port=1),
        "no such database": make_conninfo(conninfo, dbname="absent"),
        "not escaped": broken,
        "no end": f"host=h password='{PLANTED}",
        "port": f"postgresql://u:{PLANTED}",
    }


def test_planted_password_is_told_by_no_command(
    guarded: str, tmp_path: Path, state_dir: Path, own_server: Cluster
):
    program = Program(tmp_path, state_dir, guarded)
    program.variables["HELENA_DATABASE_CONNECT_TIMEOUT"] = "2"
    (tmp_path / "note.md").write_text("# A note")
    for name, dsn in addresses(guarded).items():
        # The wrong ones go the same way in all commands.
        for command in COMMANDS if name == "right" else COMMANDS[1:2]:
            result = program.run(*command, "-v", stdin=b'{"file_path": "a"}\n', HELENA_DSN=dsn)
            assert_nowhere(result.stdout, result.stderr)
            assert b"this is a bug" not in result.stderr, (name, command, result.stderr)
    for variables in (
        {"DATABASE_URL": uri(guarded)},
        {"HELENA_DSN": guarded, "HELENA_DATABASE_DIRECT_DSN": f"host=h x={PLANTED}"},
        {"PGHOST": "127.0.0.1", "PGPORT": str(own_server.port), "PGPASSWORD": PASSWORD},
    ):
        alone = Program(tmp_path, state_dir, "")
        alone.variables |= variables
        result = alone.run("status", "-v")
        assert_nowhere(result.stdout, result.stderr)
    config_file = tmp_path / "own.toml"
    config_file.write_text(f'[database]\ndsn = "{uri(guarded)}"\nconnect_timeout = "x"\n')
    result = program.run("status", "-v", "--config", str(config_file))
    assert_nowhere(result.stdout, result.stderr)
    config_file.unlink()
    assert_nowhere(*files_below(tmp_path), *files_below(state_dir))


@contextlib.contextmanager
def watching(program: Program, errors: Path) -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    """`helena watch` in its folder, and the port of its metrics."""
    variables = program.variables | {
        "HELENA_METRICS_PORT": "0",
        "HELENA_BATCH_INTERVAL": "0.2",
        "HELENA_WATCH_SETTLE": "0.1",
    }
    with errors.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "helena_cli", "watch", "-v", "docs"],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            cwd=program.folder,
            env=variables,
        )
    try:

        def port() -> re.Match[bytes] | None:
            assert process.poll() is None, errors.read_text()
            return re.search(rb"http://127\.0\.0\.1:(\d+)", errors.read_bytes())

        found = wait_until(port, "the metrics are served")
        yield process, int(found[1])
    finally:
        process.kill()
        process.wait()


def ask(port: int, path: str, *, host: str = "localhost") -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        answer = b""
        while chunk := connection.recv(65_536):
            answer += chunk
    return answer


def insist(port: int, path: str, *, host: str = "localhost") -> bytes:
    """In a crowd one may be turned away, but not for long."""

    def attempt() -> bytes:
        with suppress(ConnectionError):
            return ask(port, path, host=host)
        return b""

    answer: bytes = wait_until(attempt, "there is room for one more")
    return answer


def failures(port: int) -> int:
    """How many flushes have failed."""
    counted: int = json.loads(ask(port, "/batch/metrics").partition(b"\r\n\r\n")[2])["flushes"][
        "failures"
    ]
    return counted


def test_planted_password_is_nowhere_while_it_is_used(
    guarded: str, tmp_path: Path, state_dir: Path, own_server: Cluster
):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/note.md").write_text("# A note")
    program, errors = Program(tmp_path, state_dir, uri(guarded)), tmp_path / "errors"
    with psycopg.connect(own_server.dsn, autocommit=True) as admin:

        def written() -> bool:
            return admin.execute("SELECT 1 FROM es_document_references").fetchone() is not None

        with watching(program, errors) as (process, port):
            wait_until(written, "the note is written")
            for path in ("/", "/batch/metrics", "/metrics", "/healthz", "/absent"):
                assert_nowhere(ask(port, path))
            assert_nowhere(*processes())
            shown = admin.execute("SELECT s::text FROM pg_stat_activity s").fetchall()
            assert_nowhere(*(text.encode() for (text,) in shown))
            # An outage makes it say more.
            own_server.stop("immediate")
            (tmp_path / "docs/note.md").write_text("# Another note")
            wait_until(lambda: failures(port), "a flush has failed")
            assert_nowhere(ask(port, "/batch/metrics"), ask(port, "/metrics"), ask(port, "/"))
            own_server.start()
            process.send_signal(signal.SIGTERM)
            process.wait(40)
    assert_nowhere(*files_below(tmp_path), *files_below(state_dir))


ODD_PASSWORDS = st.text(st.sampled_from("@:/?#%&='\\ []4²\u202e"), max_size=6)


def test_no_error_repeats_any_part_of_an_address(seed: int, figures: Counter[str]):
    @seeded(seed)
    @settings(
        max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(
        ODD_PASSWORDS, ODD_PASSWORDS, st.sampled_from(("u:{}@h/d", "u:{}@h:5/d?x={}", ":{}@", "{}"))
    )
    def check(before: str, after: str, form: str) -> None:
        figures["inputs tried"] += 1
        secret = f"{before}{PLANTED}{after}"
        uris = f"postgresql://{form}".replace("{}", secret)
        for dsn in (
            uris,
            f"host=h password={secret}",
            f"password='{secret}' host=h",
            f"host {secret}",
        ):
            # What libpq itself takes for another part is no password any more.
            with suppress(psycopg.Error):
                if PLANTED not in str(conninfo_to_dict(dsn).get("password", "")):
                    continue
            try:
                found = target.resolve(config.load(environ={"HELENA_DSN": dsn}))
                assert PLANTED not in found.label + found.key
            except HelenaError as error:
                assert PLANTED not in f"{error} {error.remedy} {error.__cause__}"

    check()


# Files and folders


def test_state_directory_is_private_whatever_the_umask(
    tmp_path: Path, state_dir: Path, helena_dsn: str
):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/note.md").write_text("# A note")
    program = Program(tmp_path, state_dir / "state", helena_dsn)
    old = os.umask(0)
    try:
        assert program.run("process-pending", "docs").returncode == 0
        with watching(program, tmp_path / "errors"):
            made = [state_dir / "state", *(state_dir / "state").rglob("*")]
            loose = [path.name for path in made if path.exists() and path.stat().st_mode & 0o077]
    finally:
        os.umask(old)
    assert len(made) > 3
    assert oct((state_dir / "state").stat().st_mode)[-3:] == "700"
    # Behind the directory's own rights, these hold nothing but names.
    assert not [name for name in loose if not name.endswith((".target", ".alias"))]


def test_of_a_state_directory_that_everybody_may_change_one_is_warned(
    tmp_path: Path, state_dir: Path, helena_dsn: str
):
    state_dir.chmod(0o777)
    result = Program(tmp_path, state_dir, helena_dsn).run("process-pending")
    assert result.returncode == 0
    assert b"chmod 700" in result.stderr


@contextlib.contextmanager
def meddling(step: Callable[[], None]) -> Iterator[None]:
    """Somebody does a step again and again meanwhile."""
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            with suppress(OSError):
                step()

    thread = threading.Thread(target=run, name="meddler")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_claimed_file_that_is_exchanged_or_vanishes_leads_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: float
):
    monkeypatch.setattr(claims, "REST", 0.0)
    secret, folder = tmp_path / "secret.json", tmp_path / "pending"
    secret.write_text(f'{{"type": "{PLANTED}"}}')
    before = secret.stat()
    folder.mkdir()
    path = folder / claims.PROCESSING / "a.json"

    def put(place: Path) -> None:
        """Not written in place: a link that lies there would be followed."""
        fresh = tmp_path / f"{threading.get_ident()}.json"
        fresh.write_text("{}")
        fresh.replace(place)

    def exchange() -> None:
        path.unlink()
        path.symlink_to(secret)
        path.unlink()
        put(path)

    deadline, accepted = time.monotonic() + minutes * 60 / 4, 0
    with meddling(exchange):
        while not accepted or time.monotonic() < deadline:
            put(folder / "a.json")
            with JsonFiles(folder, max_bytes=1000, sleep=lambda _: None) as files:
                for file, content in files.read():
                    assert PLANTED not in str(content.values)
                    files.accept(file)
                    accepted += 1
    after = secret.stat()
    assert (after.st_mode, after.st_mtime_ns, after.st_nlink) == (
        before.st_mode,
        before.st_mtime_ns,
        1,
    )


def test_claimed_file_that_vanishes_after_it_was_read_is_no_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    read = Claims.read

    def read_and_lose(self: Claims, claimed: claims.Claimed, max_bytes: int) -> bytes:
        content = read(self, claimed, max_bytes)
        (tmp_path / claims.PROCESSING / claimed.name).unlink()
        return content

    monkeypatch.setattr(Claims, "read", read_and_lose)
    (tmp_path / "a.json").write_text("{}")
    with JsonFiles(tmp_path, max_bytes=1000) as files:
        assert [content.values for _, content in files.read()] == [{}]


def test_folder_that_becomes_a_link_after_the_scan_is_not_followed(tmp_path: Path):
    root, outside = tmp_path / "docs", tmp_path / "outside"
    (root / "a/b").mkdir(parents=True)
    outside.mkdir()
    for folder in (root / "a/b", outside):
        (folder / "note.md").write_text(folder.name)
    (found,) = scan.walk(root, "", documents=Filter(root, DocumentSettings()))
    assert isinstance(found, Found)
    source = scan.read(found, "docs", max_bytes=1000, inside=root)
    assert source is not None
    assert source.content == b"b"
    shutil.rmtree(root / "a/b")
    (root / "a/b").symlink_to(outside)
    assert scan.read(found, "docs", max_bytes=1000, inside=root) is None


def test_documents_raced_by_links_publish_nothing_from_elsewhere(tmp_path: Path, minutes: float):
    root, outside = tmp_path / "docs", tmp_path / "outside"
    for folder, text in ((root / "a", "mine"), (outside, PLANTED), (tmp_path / "spare", "mine")):
        folder.mkdir(parents=True)
        (folder / "note.md").write_text(text)

    def exchange() -> None:
        (root / "a").rename(tmp_path / "away")
        (root / "a").symlink_to(outside)
        (root / "a").unlink()
        (tmp_path / "away").rename(root / "a")

    documents, looked = Filter(root, DocumentSettings()), 0
    deadline = time.monotonic() + minutes * 60 / 4
    with meddling(exchange):
        while not looked or time.monotonic() < deadline:
            for found in scan.walk(root, "", documents=documents):
                with suppress(OSError):
                    if isinstance(found, Found) and (
                        source := scan.read(found, "docs", max_bytes=1000, inside=root)
                    ):
                        assert source.content == b"mine"
                        looked += 1


@pytest.mark.parametrize("place", ["processing", "done", "failed", "processing/.lock"])
def test_links_in_place_of_helenas_own_folders_are_refused(tmp_path: Path, place: str):
    folder, outside = tmp_path / "pending", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (folder / "a.json").write_text("{}")
    if "/" in place:
        (folder / "processing").mkdir()
    (folder / place).symlink_to(outside / "lock" if "/" in place else outside)
    with suppress(HelenaError, Unusable), JsonFiles(folder, max_bytes=1000) as files:
        for file, _ in files.read():
            files.fail(file, "no")
    assert list(outside.iterdir()) == []


# The port


def test_slow_clients_and_foreign_names_stop_neither_the_work_nor_the_end(
    tmp_path: Path, state_dir: Path, helena_dsn: str
):
    docs = tmp_path / "docs"
    docs.mkdir()
    program = Program(tmp_path, state_dir, helena_dsn)
    with (
        psycopg.connect(helena_dsn, autocommit=True) as admin,
        watching(program, tmp_path / "errors") as (process, port),
        ExitStack() as stack,
    ):
        for _ in range(100):
            client = socket.create_connection(("127.0.0.1", port), timeout=20)
            stack.enter_context(client).sendall(b"GET /batch/metrics HTTP/1.1\r\nX:")
        rebound = insist(port, "/batch/metrics", host="evil.example")
        assert rebound.startswith(b"HTTP/1.1 421 ")
        assert b"conservation" not in rebound
        (docs / "note.md").write_text("# A note")
        query = "SELECT 1 FROM es_document_references"
        wait_until(lambda: admin.execute(query).fetchone(), "the note is written")
        assert b"conservation" in insist(port, "/batch/metrics")
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0


def test_task_publishes_nothing_from_outside_of_the_indexed_folders(
    tmp_path: Path, state_dir: Path, helena_dsn: str
):
    run, outside = tmp_path / "run", tmp_path / "outside"
    queue = run / "helena_tasks/realtime_queue"
    for folder in (queue, outside, run / "docs"):
        folder.mkdir(parents=True)
    (outside / "note.md").write_text(PLANTED)
    (run / "docs/note.md").write_text("mine")
    for number, named in enumerate((outside / "note.md", "../outside/note.md", "docs/note.md")):
        (queue / f"{number}.json").write_text(json.dumps({"file_path": str(named)}))
    report = Program(run, state_dir, helena_dsn).json("process-pending", code=1)
    assert [one["reason"] for one in report["failures"]] == [
        f"{outside / 'note.md'} lies in no folder that is indexed; "
        "helena process-pending FOLDER adds it"
    ] * 2
    with psycopg.connect(helena_dsn) as database:
        rows = database.execute("SELECT es_doc_id FROM es_document_references").fetchall()
    assert rows == [("docs:note.md",)]
