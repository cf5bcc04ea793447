"""`helena stop-realtime` as a person, a script or another program meets it."""

import fcntl
import grp
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from helena_cli.host.processes import find
from tests.commands import Program, Result
from tests.hosts import wait_until
from tests.realtime import DEAF, SHELL, Process, Writers

pytestmark = pytest.mark.acceptance

AWAY = "host=127.0.0.1 port=1 user=nobody dbname=none connect_timeout=2"


@pytest.fixture
def writers(state_dir: Path) -> Iterator[Writers]:
    # Beside the state: other runs of pytest close their common folder to other users.
    folder = state_dir / "writers"
    folder.mkdir()
    found = Writers(folder)
    yield found
    found.close()


@pytest.fixture
def helena(tmp_path: Path, state_dir: Path, writers: Writers) -> Program:
    """The program, which looks for the writers `a` and `b`; its database is away."""
    program = Program(tmp_path, state_dir / "state", AWAY)
    program.variables |= {
        "HELENA_REALTIME_PROCESSES": f"{writers.name('a')},{writers.name('b')}",
        "HELENA_REALTIME_QUIET": "0.5",
    }
    return program


def stop(helena: Program, *arguments: str, code: int = 0) -> Result:
    result = helena.run("stop-realtime", *arguments)
    assert result.returncode == code, result.stderr.decode()
    return result


# Nothing happens unasked


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_without_yes_and_a_terminal_the_plan_is_shown_and_nothing_stopped(
    helena: Program, writers: Writers, arguments: tuple[str, ...]
):
    writer = writers.writer("a")
    result = stop(helena, *arguments, code=5)
    assert str(writer.pid).encode() in result.stdout
    assert b"--yes" in result.stderr
    assert writer.poll() is None
    assert not record(helena).exists()


def record(helena: Program) -> Path:
    return Path(helena.variables["HELENA_STATE_DIR"]) / "stop-realtime.json"


def test_a_dry_run_shows_and_stops_nothing(helena: Program, writers: Writers):
    writer = writers.writer("a")
    found = helena.json("stop-realtime", "--dry-run", "--yes")
    assert [entry["pid"] for entry in found["found"]] == [writer.pid]
    assert (found["stopped"], found["disabled"], found["remaining"]) == ([], [], 1)
    assert writer.poll() is None
    assert not record(helena).exists()


def on_a_terminal(helena: Program, answer: bytes, *arguments: str) -> Result:
    """The program, when this is typed at the terminal that is its stdin."""
    mine, theirs = pty.openpty()
    os.write(mine, answer)
    try:
        return subprocess.run(
            [sys.executable, "-m", "helena_cli", "stop-realtime", *arguments],
            stdin=theirs,
            capture_output=True,
            cwd=helena.folder,
            env=helena.variables,
            timeout=60,
        )
    finally:
        os.close(mine)
        os.close(theirs)


def test_on_a_terminal_it_asks_and_takes_only_a_yes(helena: Program, writers: Writers):
    writer = writers.writer("a")
    for answer, code in ((b"\n", 5), (b"n\n", 5), (b"y\n", 0)):
        assert writer.poll() is None
        result = on_a_terminal(helena, answer)
        assert b"Stop 1 process, and keep that stopped? [y/N]" in result.stderr
        assert result.returncode == code
    assert writer.wait(10) == -signal.SIGTERM


def test_with_json_it_asks_nothing_even_on_a_terminal(helena: Program, writers: Writers):
    writer = writers.writer("a")
    result = on_a_terminal(helena, b"y\n", "--json")
    assert result.returncode == 5
    assert json.loads(result.stdout)["remaining"] == 1
    assert writer.poll() is None


def test_an_interrupt_says_where_to_see_what_was_stopped_so_far(helena: Program, writers: Writers):
    writers.writer("a", DEAF)
    process = helena.start("stop-realtime", "--yes", HELENA_REALTIME_GRACE="60")
    wait_until(record(helena).exists, "the record")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"helena stop-realtime --undo --dry-run" in errors
    assert len(helena.json("stop-realtime", "--undo", "--dry-run")["found"]) == 1


# What it does


def test_it_stops_says_so_and_undo_brings_it_back(helena: Program, writers: Writers):
    first, second = writers.writer("a"), writers.writer("b")
    report = helena.json("stop-realtime", "--yes")
    assert {"found", "stopped", "disabled", "remaining"} <= set(report)
    assert {"pid", "command", "supervisor"} <= set(report["found"][0])
    assert {entry["pid"] for entry in report["stopped"]} == {first.pid, second.pid}
    assert (report["disabled"], report["remaining"]) == ([], 0)
    assert {first.wait(10), second.wait(10)} == {-signal.SIGTERM}
    assert b"Nothing runs" in stop(helena, "--yes").stderr
    # Undoing is shown first, too.
    assert helena.json("stop-realtime", "--undo", code=5)["remaining"] == 2
    assert helena.json("stop-realtime", "--undo", "--dry-run")["restored"] == []
    assert not find([writers.name("a"), writers.name("b")])
    back = helena.json("stop-realtime", "--undo", "--yes")
    assert (len(back["restored"]), back["failures"], back["remaining"]) == (2, [], 0)
    assert len(find([writers.name("a"), writers.name("b")])) == 2
    assert b"Nothing is stopped" in stop(helena, "--undo", "--yes").stderr


def test_it_needs_no_database_and_starts_none(helena: Program, writers: Writers):
    del helena.variables["HELENA_DSN"]
    writer = writers.writer("a")
    stop(helena, "--yes")
    assert writer.wait(10) == -signal.SIGTERM
    state = Path(helena.variables["HELENA_STATE_DIR"])
    assert sorted(path.name for path in state.iterdir()) == [
        "stop-realtime.json",
        "stop-realtime.lock",
    ]


def test_no_password_is_shown_to_a_person_a_program_or_a_log(helena: Program, writers: Writers):
    path = writers.script("a")
    dsn = "postgresql://me:s3cret@host/db"
    writers.run([sys.executable, path, "--password", "s3cret", dsn, "password=s3cret"], up=path)
    said = [stop(helena, "--dry-run"), stop(helena, "--json", code=5), stop(helena, "-v", "--yes")]
    said += [stop(helena, "--undo", "--dry-run"), stop(helena, "-v", "--undo", "--yes")]
    for result in said:
        assert b"s3cret" not in result.stdout + result.stderr
    assert b"--password ***" in said[0].stdout
    wait_until(lambda: find([path.stem]), "it runs again")
    # Not even here, where it is needed, can others read it.
    helena.json("stop-realtime", "--yes")
    assert record(helena).stat().st_mode & 0o777 == 0o600


def test_the_configuration_names_other_writers(helena: Program, writers: Writers):
    writer = writers.writer("other")
    del helena.variables["HELENA_REALTIME_PROCESSES"]
    (helena.folder / "helena.toml").write_text(
        f'[realtime]\nprocesses = ["{writers.name("other")}"]\nquiet = 0.0\n'
    )
    stop(helena, "--yes")
    assert writer.wait(10) == -signal.SIGTERM


# Other users


@pytest.fixture
def nobodys(writers: Writers, state_dir: Path) -> Process:
    """A writer that the user nobody runs."""
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("this needs root, and setpriv")
    state_dir.chmod(0o755)
    process = writers.run(["sh", writers.script("b", SHELL)], nobody=True)
    wait_until(lambda: find([writers.name("b")]), "it runs")
    return process


#: It may read what this interpreter needs, and nothing else is left of root's rights.
AS_NOBODY = (
    *("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"),
    *("--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"),
    "--bounding-set=-all,+dac_read_search",
)


def test_a_process_of_another_user_is_reported_and_not_failed_on(
    helena: Program, writers: Writers, nobodys: Process, state_dir: Path
):
    theirs = writers.writer("a")
    (state_dir / "state").mkdir()
    shutil.chown(state_dir / "state", "nobody")
    done = subprocess.run(
        [*AS_NOBODY, sys.executable, "-m", "helena_cli", "stop-realtime", "--yes", "--json"],
        capture_output=True,
        cwd="/",
        env=helena.variables,
        timeout=60,
    )
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert {entry["pid"]: entry["obstacle"] for entry in report["found"]} == {
        theirs.pid: "belongs to root: run this as root",
        nobodys.pid: None,
    }
    assert [entry["pid"] for entry in report["stopped"]] == [nobodys.pid]
    assert report["remaining"] == 1
    assert report["failures"][0]["what"] == f"pid {theirs.pid}"
    assert "belongs to root" in report["failures"][0]["reason"]
    assert theirs.poll() is None


def test_root_stops_the_process_of_a_user_and_starts_it_again_as_that_user(
    helena: Program, writers: Writers, nobodys: Process
):
    assert helena.json("stop-realtime", "--yes")["remaining"] == 0
    assert nobodys.wait(10) == -signal.SIGTERM
    helena.json("stop-realtime", "--undo", "--yes")
    (again,) = find([writers.name("b")])
    assert (again.user, again.process.gids().real) == ("nobody", grp.getgrnam("nogroup").gr_gid)


# What may go wrong


def test_what_cannot_be_recorded_is_not_stopped(helena: Program, writers: Writers):
    writer = writers.writer("a")
    # A folder in the way of the record that is about to be written.
    record(helena).with_suffix(".new").mkdir(parents=True)
    result = stop(helena, "--yes", code=3)
    assert b"cannot be recorded" in result.stderr
    assert b"HELENA_STATE_DIR" in result.stderr
    assert writer.poll() is None


def test_a_damaged_record_is_told_and_nothing_stopped(helena: Program, writers: Writers):
    writer = writers.writer("a")
    record(helena).parent.mkdir(parents=True)
    record(helena).write_text('{"entries": [{"type": "process"}')
    for arguments in (("--yes",), ("--undo", "--yes")):
        result = stop(helena, *arguments, code=1)
        assert b"cannot be read" in result.stderr
    assert writer.poll() is None


def test_two_at_once_do_not_get_in_each_others_way(helena: Program, writers: Writers):
    writer = writers.writer("a")
    record(helena).parent.mkdir(parents=True)
    with record(helena).with_name("stop-realtime.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert b"at work" in stop(helena, "--yes", code=1).stderr
    assert writer.poll() is None


def test_a_run_that_was_killed_in_the_middle_can_be_undone(helena: Program, writers: Writers):
    writer = writers.writer("a")
    helena.variables["HELENA_REALTIME_QUIET"] = "600"
    with helena.start("stop-realtime", "--yes") as process:
        assert writer.wait(30) == -signal.SIGTERM
        process.kill()
    back = helena.json("stop-realtime", "--undo", "--yes")
    assert (len(back["restored"]), back["remaining"]) == (1, 0)
    assert psutil.pid_exists(back["restored"][0]["pid"])


def test_an_option_that_does_not_exist_is_wrong_usage(helena: Program):
    stop(helena, "--kill", code=2)
