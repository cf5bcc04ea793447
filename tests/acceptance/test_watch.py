"""`helena watch` as a person or a service manager meets it: real processes, real signals."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest

from helena_cli.batch.spool import Spool
from tests.cluster import Cluster
from tests.commands import Program
from tests.hosts import wait_until
from tests.proxy import Proxy

pytestmark = [pytest.mark.acceptance, pytest.mark.postgres]


class Place:
    """A folder to run in, with documents in `docs`, and its database."""

    def __init__(self, folder: Path, state_dir: Path, dsn: str, admin: str | None = None) -> None:
        self.folder = folder
        self.docs = folder / "docs"
        self.docs.mkdir(parents=True)
        self.state_dir = state_dir
        self.program = Program(folder, state_dir, dsn)
        self.program.variables |= {
            "HELENA_METRICS_PORT": "0",
            "HELENA_BATCH_INTERVAL": "0.3",
            "HELENA_WATCH_SETTLE": "0.1",
            "HELENA_WATCH_GRACE": "0.2",
            "HELENA_DOCUMENTS_ANNOUNCE": "none",
        }
        self.admin = psycopg.connect(admin or dsn, autocommit=True)
        self.errors = folder / "errors"
        self._said_before = 0
        self._running: list[subprocess.Popen[bytes]] = []

    def watch(self, *arguments: str, **variables: str) -> "subprocess.Popen[bytes]":
        """Start to watch, and wait until that has begun."""
        environ = self.program.variables | variables
        self._said_before = self.errors.stat().st_size if self.errors.exists() else 0
        with self.errors.open("ab") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "helena_cli", "watch", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                cwd=self.folder,
                env=environ,
            )
        self._running.append(process)
        wait_until(lambda: self.said("metrics are at") or process.poll() is not None, "it runs")
        return process

    def said(self, text: str) -> bool:
        return text.encode() in self.errors.read_bytes()[self._said_before :]

    def count(self) -> int:
        row = self.admin.execute(
            "SELECT count(*) FROM es_document_references WHERE NOT metadata ? 'deleted_at'"
        ).fetchone()
        assert row is not None
        return int(row[0])

    def has(self, doc_id: str) -> bool:
        query = "SELECT 1 FROM es_document_references WHERE es_doc_id = %s"
        return self.admin.execute(query, [doc_id]).fetchone() is not None

    def queued(self) -> int:
        (path,) = self.state_dir.glob("*.spool")
        spool = Spool.open(path)
        try:
            return spool.queue().total
        finally:
            spool.close()

    def close(self) -> None:
        for process in self._running:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait(20)
        self.admin.close()


@contextmanager
def placed(folder: Path, state_dir: Path, dsn: str, admin: str | None = None) -> Iterator[Place]:
    place = Place(folder, state_dir, dsn, admin)
    try:
        yield place
    finally:
        place.close()


@pytest.fixture
def place(tmp_path: Path, state_dir: Path, helena_dsn: str) -> Iterator[Place]:
    with placed(tmp_path / "run", state_dir, helena_dsn) as made:
        yield made


def end(process: "subprocess.Popen[bytes]", number: int = signal.SIGTERM) -> int:
    process.send_signal(number)
    return process.wait(40)


def test_a_save_is_in_the_database_within_the_interval_and_a_second(place: Place):
    # With the settings as they come. Most of the time is the flush interval, five seconds.
    for name in ("HELENA_BATCH_INTERVAL", "HELENA_WATCH_SETTLE", "HELENA_WATCH_GRACE"):
        del place.program.variables[name]
    process = place.watch("docs")

    def in_time() -> bool:
        name = f"{time.monotonic_ns()}.md"
        saved = time.monotonic()
        (place.docs / name).write_text("# A")
        wait_until(lambda: place.has(f"docs:{name}"), "it is written")
        return time.monotonic() - saved <= 5.0 + 1.0

    # Again if need be: the machine may have had other things to do.
    assert any(in_time() for _ in range(5))
    assert end(process) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_drains_when_it_is_told_to_end(place: Place, number: int):
    process = place.watch("docs", HELENA_BATCH_INTERVAL="600", HELENA_WATCH_SETTLE="600")
    for n in range(20):
        (place.docs / f"{n}.md").write_text(f"# {n}")

    assert end(process, number) == 0
    assert place.count() == 20
    assert place.queued() == 0


def test_what_remains_is_said(tmp_path: Path, state_dir: Path, proxy: Proxy, helena_dsn: str):
    with placed(tmp_path / "run", state_dir, proxy.dsn, admin=helena_dsn) as place:
        process = place.watch("docs", HELENA_BATCH_SHUTDOWN_TIMEOUT="1")
        (place.docs / "a.md").write_text("# A")
        wait_until(lambda: place.has("docs:a.md"), "it runs")
        proxy.stop()
        (place.docs / "b.md").write_text("# B")

        assert end(process) == 1
        assert place.said("Still queued: 1 operation, in ")
        assert place.queued() == 1


def test_a_second_signal_ends_it_at_once(
    tmp_path: Path, state_dir: Path, proxy: Proxy, helena_dsn: str
):
    with placed(tmp_path / "run", state_dir, proxy.dsn, admin=helena_dsn) as place:
        process = place.watch("docs", HELENA_BATCH_SHUTDOWN_TIMEOUT="600")
        (place.docs / "a.md").write_text("# A")
        wait_until(lambda: place.has("docs:a.md"), "it runs")
        proxy.stalled = True
        (place.docs / "b.md").write_text("# B")
        wait_until(lambda: place.queued() == 1, "it is queued")
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: place.said("Stopping."), "the first signal was heard")

        assert end(process) == -signal.SIGTERM
        proxy.stalled = False
    assert place.queued() == 1


def test_a_second_watcher_of_a_folder_learns_who_is_there(place: Place):
    process = place.watch("docs")
    (place.docs / "sub").mkdir()
    for path in ("docs", "docs/sub", "."):
        result = place.program.run("watch", path)
        assert result.returncode == 1
        assert f"by process {process.pid}, since 20" in result.stderr.decode()
        assert "what to do: " in result.stderr.decode()
    assert end(process) == 0

    assert end(place.watch("docs")) == 0


def test_the_configuration_is_read_again_and_a_bad_one_is_not(place: Place):
    config, more = place.folder / "helena.toml", place.folder / "more"
    config.write_text('[documents]\nroots = ["docs"]\n')
    process = place.watch()
    more.mkdir()
    (more / "a.md").write_text("# A")
    config.write_text('[documents]\nroot = ["more"]\n')
    process.send_signal(signal.SIGHUP)
    wait_until(lambda: place.said("has no key 'root'"), "what is wrong is said")
    wait_until(lambda: place.said("The old configuration stays in use."), "and what follows")
    (place.docs / "b.md").write_text("# B")
    wait_until(lambda: place.has("docs:b.md"), "the old one is in use")

    config.write_text('[documents]\nroots = ["docs", "more"]\n[batch]\nsize = 7\n')
    process.send_signal(signal.SIGHUP)
    wait_until(lambda: place.has("more:a.md"), "the new folder is watched")
    wait_until(
        lambda: place.said("Changes of [batch] count from the next start on."), "the rest is said"
    )
    (more / "c.md").write_text("# C")
    wait_until(lambda: place.has("more:c.md"), "for good")
    assert end(process) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "There is nothing to watch."),
        (["nowhere"], 2, "There is no folder 'nowhere'."),
        ([""], 2, "There is no folder ''."),
        (["docs/a.md"], 2, "There is no folder 'docs/a.md'."),
        (["docs", "--log-format", "xml"], 2, "'xml' is not one of"),
    ],
)
def test_wrong_usage_says_what_is_right(place: Place, arguments: list[str], code: int, said: str):
    (place.docs / "a.md").write_text("# A")
    result = place.program.run("watch", *arguments)

    assert result.returncode == code
    assert said in result.stderr.decode()
    assert result.stdout == b""


def test_a_database_that_was_never_prepared_ends_the_start(
    tmp_path: Path, state_dir: Path, dsn: str
):
    with placed(tmp_path / "run", state_dir, dsn) as place:
        result = place.program.run("watch", "docs")

    assert result.returncode == 3
    assert "helena init" in result.stderr.decode()


def test_each_flush_is_a_line_of_json_when_that_is_asked_for(place: Place):
    with place.program.start("watch", "docs", "--log-format", "json") as process:
        try:
            (place.docs / "a.md").write_text("# A")
            wait_until(lambda: place.has("docs:a.md"), "it is written")
            process.send_signal(signal.SIGTERM)
            output, errors = process.communicate(timeout=40)
        finally:
            process.kill()

    assert process.returncode == 0
    flushes = [json.loads(line) for line in output.splitlines()]
    assert sum(flush["operations"] for flush in flushes) == 1
    assert {json.loads(line)["event"] for line in errors.splitlines()} == {"log"}


def test_on_a_terminal_there_is_a_live_view_and_ctrl_c_ends_it(place: Place):
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "helena_cli", "watch", "docs"],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        cwd=place.folder,
        env=place.program.variables | {"TERM": "xterm-256color"},
        start_new_session=True,
    )
    os.close(terminal)
    seen = b""
    try:
        (place.docs / "a.md").write_text("# A")
        os.set_blocking(main, False)

        def shown() -> bool:
            nonlocal seen
            # Nothing new, or nobody there any more.
            with suppress(OSError):
                seen += os.read(main, 65536)
            return b"a.md" in seen

        wait_until(shown, "the document is shown")
        process.send_signal(signal.SIGINT)
        wait_until(lambda: shown() and process.poll() is not None, "it ends")
    finally:
        process.kill()
        process.wait()
        os.close(main)
    assert process.returncode == 0
    text = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", seen).decode(errors="replace")
    assert "Traceback" not in text


QUEUED_EVENTS = Path("/proc/sys/fs/inotify/max_queued_events")


@pytest.mark.parametrize("lost", [False, *([True] if QUEUED_EVENTS.exists() else [])])
def test_ten_thousand_documents_of_a_storm_while_it_is_stopped_are_found(place: Place, lost: bool):
    process = place.watch("docs")
    known = place.docs / "known"
    known.mkdir()
    (known / "a.md").write_text("# A")
    wait_until(lambda: place.has("docs:known/a.md"), "it runs")
    process.send_signal(signal.SIGSTOP)
    if lost:
        # More events than the kernel keeps; two that follow each other must not be the same.
        limit = int(QUEUED_EVENTS.read_text())
        for n in range(limit // 2 + 1):
            os.utime(known / "a.md", (n, n))
            os.utime(known, (n, n))
    for n in range(200):
        folder = place.docs / f"s{n % 7}" / f"d{n}"
        folder.mkdir(parents=True)
        for m in range(50):
            (folder / f"{m}.md").write_text(f"# {n} {m}")
    (known / "a.md").unlink()
    process.send_signal(signal.SIGCONT)

    wait_until(lambda: place.count() == 10_000, "all of them are there", limit=120)
    assert place.said("were lost") is lost
    assert end(process) == 0


def test_a_database_that_stops_under_load_loses_nothing(
    tmp_path: Path, state_dir: Path, own_server: Cluster
):
    own_server.start()
    with psycopg.connect(own_server.dsn) as connection:
        from helena_cli.database import schema

        connection.autocommit = True
        schema.initialise(connection)
    with placed(tmp_path / "run", state_dir, own_server.dsn) as place:
        process = place.watch("docs")
        for n in range(300):
            (place.docs / f"{n}.md").write_text(f"# {n}")
            if n == 100:
                wait_until(lambda: place.has("docs:0.md"), "it runs")
                place.admin.close()
                own_server.stop("immediate")
        (place.docs / "0.md").unlink()
        wait_until(lambda: place.queued() >= 150, "what is saved is queued")
        own_server.start()
        place.admin = psycopg.connect(own_server.dsn, autocommit=True)

        wait_until(lambda: place.count() == 299, "all is written")
        assert end(process) == 0


def test_pending_files_are_taken_in(place: Place):
    pending, tasks = place.folder / "helena_batch_pending", place.folder / "helena_tasks"
    pending.mkdir()
    message = {"sender": "a", "message_type": "NOTE", "content": "hello"}
    (pending / "1.json").write_text(json.dumps({"type": "message", "data": message}))
    (tasks / "batch_queue").mkdir(parents=True)
    (place.folder / "other").mkdir()
    (place.folder / "other" / "b.md").write_text("# B")
    (tasks / "batch_queue" / "1.json").write_text(json.dumps({"file_path": "other/b.md"}))
    backlog = place.folder / "sql" / "realtime_updates"
    backlog.mkdir(parents=True)
    (backlog / "1.sql").write_text(
        "INSERT INTO documents (file_path, title) VALUES ('x', 'y')"
        " ON CONFLICT (file_path) DO UPDATE SET title = EXCLUDED.title;"
    )
    process = place.watch("docs")

    def found(query: str) -> Callable[[], bool]:
        return lambda: place.admin.execute(query).fetchone() is not None

    wait_until(found("SELECT 1 FROM messages WHERE content = 'hello'"), "the operation file")
    wait_until(lambda: place.has("other:b.md"), "the document of the task")
    wait_until(found("SELECT 1 FROM documents WHERE title = 'y'"), "the backlog")
    assert end(process) == 0
    assert (pending / "done" / "1.json").exists()


def test_with_ten_thousand_documents_it_idles_below_one_per_cent_of_a_core(
    place: Place, helena_dsn: str
):
    import psutil

    for n in range(10_000):
        folder = place.docs / f"{n % 200}"
        folder.mkdir(exist_ok=True)
        (folder / f"{n}.md").write_text(f"# {n}")
    process = place.watch("docs", HELENA_BATCH_INTERVAL="5")
    wait_until(lambda: place.count() == 10_000, "all is written", limit=120)
    watched = psutil.Process(process.pid)

    def share() -> float:
        before, began = sum(watched.cpu_times()[:2]), time.monotonic()
        time.sleep(5)
        return float(sum(watched.cpu_times()[:2]) - before) / (time.monotonic() - began)

    # The first ones may still see what the beginning left to do.
    assert any(share() < 0.01 for _ in range(3))
    connections = place.admin.execute(
        "SELECT application_name FROM pg_stat_activity WHERE application_name LIKE 'helena%%'"
        " AND datname = current_database()"
    ).fetchall()

    assert len(connections) <= 3
    assert end(process) == 0
