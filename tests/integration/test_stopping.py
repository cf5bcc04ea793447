"""Stopping real processes: who is ended, who is left alone, and what comes back."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from msgspec.structs import replace

from helena_cli.host.processes import ended, find
from helena_cli.host.stop_plan import make_plan
from helena_cli.host.stop_record import Record, StoppedProcess
from helena_cli.host.stopping import Report, Stopping
from helena_cli.host.supervisors import Wanted
from helena_cli.host.undoing import undo
from tests.hosts import PROJECT, wait_until
from tests.realtime import DEAF, RESTARTS, RESTARTS_UNSEEN, SLEEPS, WITH_CHILDREN, Writers

#: Much time for the program, and long enough for RESTARTS to be seen.
QUIET = 1.0

Stop = Callable[..., Report]


@pytest.fixture
def writers(tmp_path: Path) -> Iterator[Writers]:
    found = Writers(tmp_path)
    yield found
    found.close()


@pytest.fixture
def record(state_dir: Path) -> Record:
    return Record(state_dir)


@pytest.fixture
def stop(writers: Writers, record: Record) -> Stop:
    """Stop what has one of these labels."""

    def run(*labels: str, grace: float = 10.0, quiet: float = 0.0) -> Report:
        wanted = Wanted(tuple(writers.name(label) for label in labels))
        plan = make_plan(wanted)
        return Stopping(plan, wanted, record, grace=grace, quiet=quiet).apply()

    return run


def results(report: Report) -> dict[int, str]:
    return {stopped.pid: stopped.result for stopped in report.stopped}


# Who is found


@pytest.mark.parametrize(
    "start",
    [
        lambda writers, path: [sys.executable, path],
        lambda writers, path: [sys.executable, "-um", path.stem],
        lambda writers, path: ["timeout", "600", sys.executable, path],
        lambda writers, path: ["sh", "-c", f"'{sys.executable}' '{path}'; true"],
    ],
    ids=["script", "module", "wrapper", "shell"],
)
def test_a_writer_is_found_however_it_was_started(writers: Writers, stop: Stop, start):
    path = writers.script("a")
    process = writers.run(start(writers, path), up=path)
    report = stop("a")
    assert len(report.stopped) == 1
    assert (report.remaining, report.failures) == (0, [])
    # A wrapper has nothing left to do.
    process.wait(10)
    assert writers.running("a") == []


def test_a_script_that_is_its_own_program_is_found(writers: Writers, stop: Stop):
    path = writers.script("a", f"#!{sys.executable} -u\n{SLEEPS}")
    path.chmod(0o755)
    process = writers.run([path], up=path)
    assert results(stop("a")) == {process.pid: "ended"}


@pytest.mark.parametrize("interpreter", ["python3.99", "pypy3"])
def test_an_interpreter_with_a_version_is_known(
    writers: Writers, stop: Stop, tmp_path: Path, interpreter: str
):
    path = writers.script("a")
    (tmp_path / interpreter).symlink_to(sys.executable)
    process = writers.run([tmp_path / interpreter, path], up=path)
    assert results(stop("a")) == {process.pid: "ended"}


def test_who_only_has_the_name_on_the_command_line_survives(writers: Writers, stop: Stop):
    writer = writers.writer("a")
    path = writers.folder / f"{writers.name('a')}.py"
    editor = writers.script("editor")
    bystanders = [
        writers.run(["tail", "-f", path]),
        writers.run(["grep", path.stem]),
        writers.run(["sh", "-c", f"sleep 600; : {path}"]),
        writers.run(["bash", "-c", "sleep 600; true", path]),
        writers.run([sys.executable, "-c", "import time; time.sleep(600)", path]),
        writers.run([sys.executable, editor, path], up=editor),
    ]
    if shutil.which("vim"):
        bystanders.append(writers.run(["vim", "-es", path]))
    report = stop("a")
    assert results(report) == {writer.pid: "ended"}
    assert [one.args for one in bystanders if one.poll() is not None] == []


def test_helena_and_her_parents_are_no_target(writers: Writers, state_dir: Path, tmp_path: Path):
    path = writers.script("a", "import subprocess, sys\nsubprocess.run(sys.argv[1:])")
    result = subprocess.run(
        [sys.executable, path, sys.executable, "-m", "helena_cli", "stop-realtime", "--yes"],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(PROJECT),
            "HELENA_STATE_DIR": str(state_dir),
            "HELENA_REALTIME_PROCESSES": f"{writers.name('a')},helena,helena_cli",
            "HELENA_REALTIME_QUIET": "0",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert "it has started this command" in result.stdout
    assert "Remaining 1" in result.stdout


def test_a_zombie_has_ended(writers: Writers, stop: Stop):
    process = writers.writer("a")
    process.kill()
    wait_until(
        lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE, "it is a zombie"
    )
    assert find([writers.name("a")]) == []
    report = stop("a")
    assert (report.stopped, report.remaining) == ([], 0)


# How they end


def test_a_writer_that_is_deaf_to_term_is_killed(writers: Writers, stop: Stop):
    process = writers.writer("a", DEAF)
    assert results(stop("a", grace=0.3)) == {process.pid: "killed"}
    assert process.wait(10) == -signal.SIGKILL


def test_a_halted_writer_is_asked_before_it_is_killed(writers: Writers, stop: Stop):
    process = writers.writer("a")
    process.send_signal(signal.SIGSTOP)
    assert results(stop("a")) == {process.pid: "ended"}
    assert process.wait(10) == -signal.SIGTERM


def test_everything_that_a_writer_started_ends_with_it(writers: Writers, stop: Stop):
    process = writers.writer("a", WITH_CHILDREN)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    stop("a")
    assert all(ended(child) for child in children)


def test_the_deaf_child_of_a_writer_is_killed(writers: Writers, stop: Stop):
    deaf = writers.script("deaf", DEAF)
    start = f"import subprocess, sys\nsubprocess.Popen([sys.executable, {str(deaf)!r}])\n{SLEEPS}"
    writers.writer("a", start)
    wait_until(deaf.with_suffix(".up").exists, "the child runs")
    assert len(writers.running("deaf")) == 1
    stop("a", grace=0.3)
    assert all(ended(one) for one in writers.running("deaf"))


def test_a_pid_that_belongs_to_another_process_meanwhile_is_not_hit(tmp_path: Path):
    """In a namespace of its own, where the next pid can be chosen."""
    script = tmp_path / "reuse.py"
    script.write_text(
        "import subprocess, time\n"
        "from helena_cli.host.processes import end\n"
        "import psutil\n"
        "first = subprocess.Popen(['sleep', '600'])\n"
        "planned = psutil.Process(first.pid)\n"
        "first.kill(); first.wait()\n"
        # The kernel tells when a process began in steps of 10 ms.
        "time.sleep(0.05)\n"
        "open('/proc/sys/kernel/ns_last_pid', 'w').write(str(first.pid - 1))\n"
        "second = subprocess.Popen(['sleep', '600'])\n"
        "assert second.pid == first.pid, 'no reuse'\n"
        "print(end([planned], grace=0.2), second.poll())\n"
        "second.kill(); second.wait()\n"
    )
    result = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, script],
        env={"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    if "unshare" in result.stderr:
        pytest.skip(f"no namespaces here: {result.stderr.strip()}")
    assert result.stdout == "{} None\n", result.stderr


# What comes back


def test_a_loop_that_restarts_a_writer_is_found_out_and_ended(
    writers: Writers, stop: Stop, record: Record
):
    path = writers.script("a")
    loop = writers.script("loop", RESTARTS)
    process = writers.run([sys.executable, loop, path], up=path)
    report = stop("a", quiet=QUIET)
    assert (report.remaining, report.failures) == (0, [])
    assert process.wait(10) == -signal.SIGTERM
    assert f"pid {process.pid} had started it again, and was ended too" in report.notes[0]
    assert all(ended(one) for one in writers.running("a"))
    path.with_suffix(".up").unlink()
    # The loop is brought back, and starts the writer itself: once.
    restored, failures = undo(record, record.entries())
    assert (len(restored), failures) == (1, [])
    wait_until(path.with_suffix(".up").exists, "the writer runs again")
    assert len(find([path.stem])) == 1


def test_a_loop_that_runs_other_things_too_is_named_and_left_alone(
    writers: Writers, stop: Stop, record: Record
):
    path = writers.script("a")
    loop = writers.script(
        "loop", f"import subprocess\nsubprocess.Popen(['sleep', '600'])\n{RESTARTS}"
    )
    process = writers.run([sys.executable, loop, path], up=path)
    report = stop("a", quiet=QUIET)
    assert report.remaining == 1
    assert f"pid {process.pid}, starts it again" in report.failures[0].reason
    assert process.poll() is None
    # Undo would start a second one beside it.
    assert record.entries() == []


def test_a_service_that_restarts_a_writer_is_named_and_left_alone(
    writers: Writers, stop: Stop, record: Record
):
    path = writers.script("a")
    serves = "import socket\nkept = socket.create_server(('127.0.0.1', 0))\n"
    loop = writers.script("loop", serves + RESTARTS)
    process = writers.run([sys.executable, loop, path], up=path)
    report = stop("a", quiet=QUIET)
    assert report.remaining == 1
    assert f"pid {process.pid}, starts it again" in report.failures[0].reason
    assert process.poll() is None
    assert record.entries() == []


def test_what_comes_back_from_nowhere_is_told_after_a_few_attempts(
    writers: Writers, stop: Stop, record: Record
):
    path = writers.script("a")
    loop = writers.script("loop", RESTARTS_UNSEEN)
    writers.run([sys.executable, loop, path], up=path)
    report = stop("a", quiet=QUIET)
    assert report.remaining == 1
    assert "again and again" in report.failures[0].reason
    # However often it came back, it is one thing to undo.
    assert len(record.entries()) == 1


def test_two_of_the_same_side_by_side_come_back_as_two(
    writers: Writers, stop: Stop, record: Record
):
    path = writers.script("a")
    for _ in range(2):
        writers.run([sys.executable, path])
    wait_until(lambda: len(find([path.stem])) == 2, "both run")
    stop("a")
    undo(record, record.entries())
    assert len(find([path.stem])) == 2


def test_a_slow_loop_that_still_runs_is_told(writers: Writers, stop: Stop):
    path = writers.script("a")
    loop = writers.script("loop", RESTARTS.replace("0.2", "600"))
    process = writers.run([sys.executable, loop, path], up=path)
    report = stop("a", quiet=QUIET)
    assert report.remaining == 0
    assert f"pid {process.pid} had started it" in report.notes[0]


# Undo


def test_undo_starts_the_same_again_in_its_folder_with_its_variables(
    writers: Writers, stop: Stop, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MARK", "as it was")
    path = writers.script("a", f"import os\nprint(os.getcwd(), os.environ['MARK'])\n{SLEEPS}")
    log = tmp_path / "log"
    up = path.with_suffix(".up")
    with log.open("wb") as output:
        first = subprocess.Popen(
            [sys.executable, "-u", path, "--password", "geheim"], stdout=output, cwd=tmp_path
        )
    try:
        wait_until(up.exists, "it runs")
        stop("a")
    finally:
        first.kill()
        first.wait()
    monkeypatch.delenv("MARK")
    up.unlink()
    assert record.path.stat().st_mode & 0o777 == 0o600
    restored, failures = undo(record, record.entries())
    assert failures == []
    wait_until(up.exists, "it runs again")
    assert log.read_text() == f"{tmp_path} as it was\n" * 2
    assert "geheim" not in restored[0].command
    assert [one.pid for one in find([path.stem])] == [restored[0].pid]


def test_undo_twice_starts_nothing_twice(writers: Writers, stop: Stop, record: Record):
    writers.writer("a")
    stop("a")
    entries = record.entries()
    undo(record, entries)
    assert record.entries() == []
    assert not record.path.exists()
    # As if the first run had been cut off before it could forget.
    restored, failures = undo(record, entries)
    assert failures == []
    assert [one.pid for one in find([writers.name("a")])] == [restored[0].pid]


def test_what_cannot_start_again_stays_in_the_record(writers: Writers, stop: Stop, record: Record):
    path = writers.script("a")
    writers.run([sys.executable, path], up=path)
    stop("a")
    path.unlink()
    restored, failures = undo(record, record.entries())
    assert restored == []
    assert "ended at once, with code 2" in failures[0].reason
    assert len(record.entries()) == 1


def test_a_log_that_cannot_be_written_is_named_and_nothing_is_started(
    writers: Writers, stop: Stop, record: Record, tmp_path: Path
):
    writers.writer("a")
    stop("a")
    log = tmp_path / "gone" / "log"
    (entry,) = record.entries()
    assert isinstance(entry, StoppedProcess)
    restored, failures = undo(record, [replace(entry, output=str(log))])
    assert restored == []
    assert f"{log}: No such file" in failures[0].reason
    assert not find([writers.name("a")])


def test_stopping_twice_is_harmless(writers: Writers, stop: Stop, record: Record):
    writers.writer("a")
    stop("a")
    entries = record.entries()
    report = stop("a")
    assert (report.stopped, report.failures, report.remaining) == ([], [], 0)
    assert record.entries() == entries


def test_the_child_of_a_writer_that_is_a_writer_too_is_started_by_it_alone(
    writers: Writers, stop: Stop, record: Record
):
    child = writers.script("child")
    text = f"import subprocess, sys\nsubprocess.Popen([sys.executable, {str(child)!r}])\n{SLEEPS}"
    writers.writer("a", text)
    wait_until(child.with_suffix(".up").exists, "the child runs")
    report = stop("a", "child")
    assert len(report.stopped) == 2
    assert len(record.entries()) == 1
