"""Scripts that use the library, in processes of their own: how they begin, share the work, end."""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from helena_cli.batch.lease import Lease
from tests.hosts import Host, wait_until, watched_connections
from tests.proxy import Proxy

pytestmark = [pytest.mark.acceptance, pytest.mark.postgres]

#: Adds the numbers from `first` on and ends.
ADD = """
import sys
from helena_cli import add_operation
first, count = int(sys.argv[1]), int(sys.argv[2])
for n in range(first, first + count):
    add_operation("insert", "numbers", {"n": n})
"""

#: Adds one number for each line on stdin, says so, and ends with its input.
OBEY = """
import sys
from helena_cli import add_operation
for line in sys.stdin:
    add_operation("insert", "numbers", {"n": int(line)})
    print(line, end="", flush=True)
"""


@pytest.fixture
def processes() -> Iterator[ExitStack]:
    """Ends the processes that are put into it."""
    with ExitStack() as stack:
        yield stack


def obedient(
    host: Host, processes: ExitStack, first: int, **variables: str
) -> "subprocess.Popen[str]":
    """A process that has queued `first` and goes on."""
    process = host.start(OBEY, **variables)
    processes.enter_context(process)
    processes.callback(process.kill)
    say(process, first)
    return process


def say(process: "subprocess.Popen[str]", number: int) -> None:
    """Let it queue a number, and wait until it is accepted."""
    assert process.stdin is not None
    assert process.stdout is not None
    print(number, file=process.stdin, flush=True)
    assert process.stdout.readline() == f"{number}\n"


def flusher_pid(host: Host) -> int:
    """The process that says it flushes; 0 when none does."""
    spool = host.spool()
    try:
        flusher = spool.flusher()
    finally:
        spool.close()
    return flusher.pid if flusher else 0


def lease_of(host: Host) -> Lease:
    (path,) = host.spools()
    return Lease(path.with_suffix(".lease"))


def test_importing_the_package_loads_neither_driver_nor_terminal(host: Host):
    script = """
import sys, helena_cli
print({"psycopg", "typer", "rich", "sqlite3", "multiprocessing"} & {*sys.modules})
"""
    assert host.run(script).stdout == "set()\n"


def test_a_short_script_writes_at_its_own_end_and_says_nothing(host: Host):
    result = host.run(ADD, 0, 20, HELENA_BATCH_INTERVAL="3600")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    host.assert_written_once(20)


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("raise SystemExit(3)", 3),
        ("1 / 0", 1),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        ("import threading; threading.Thread(target=add_operation, args=operation).start()", 0),
        ("import atexit; atexit.register(add_operation, *operation)", 0),
    ],
)
def test_however_a_script_ends_its_operations_are_written(host: Host, ending: str, code: int):
    script = f"""
from helena_cli import add_operation
operation = ("insert", "numbers", {{"n": 1}})
if {"add_operation, " not in ending}:
    add_operation("insert", "numbers", {{"n": 0}})
{ending}
"""
    result = host.run(script, HELENA_BATCH_INTERVAL="3600")
    assert result.returncode == code
    assert "Helena" not in result.stderr
    assert len(host.numbers()) == 1


def test_ctrl_c_loses_nothing(host: Host, processes: ExitStack):
    process = obedient(host, processes, 0, HELENA_BATCH_INTERVAL="3600")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == -signal.SIGINT
    host.assert_written_once(1)


def test_a_script_without_a_database_ends_well_and_tells_what_waits_where(
    far_host: Host, proxy: Proxy
):
    proxy.stop()
    result = far_host.run(ADD, 0, 20)
    assert (result.returncode, result.stdout) == (0, "")
    assert f"20 operations wait in {far_host.state_dir}" in result.stderr
    assert "helena process-pending" in result.stderr
    assert "Traceback" not in result.stderr
    assert far_host.law().spooled == 20
    proxy.start()
    assert far_host.run(ADD, 20, 1).stderr == ""
    far_host.assert_written_once(21)


def test_a_script_whose_database_hangs_ends_all_the_same(far_host: Host, proxy: Proxy):
    proxy.stalled = True
    result = far_host.run(
        ADD, 0, 20, HELENA_BATCH_SHUTDOWN_TIMEOUT="0.1", HELENA_DATABASE_CONNECT_TIMEOUT="2"
    )
    assert result.returncode == 0
    assert "20 operations wait" in result.stderr
    assert far_host.law().spooled == 20


@pytest.mark.slow
def test_fifty_scripts_at_once_lose_and_double_nothing_with_three_connections(
    host: Host, helena_dsn: str
):
    with watched_connections(helena_dsn) as seen:
        scripts = [host.start(ADD, 20 * number, 20) for number in range(50)]
        results = [(*script.communicate(timeout=90), script.returncode) for script in scripts]
    assert results == [("", "", 0)] * 50
    host.assert_written_once(1000)
    assert 1 <= max(map(len, seen)) <= 3


def test_a_script_that_finds_a_flusher_opens_no_connection(
    far_host: Host, proxy: Proxy, processes: ExitStack
):
    obedient(far_host, processes, 0)
    wait_until(lambda: far_host.numbers() == [0], "the first process flushes")
    result = far_host.run(ADD, 1, 20)
    assert (result.returncode, result.stderr) == (0, "")
    wait_until(lambda: len(far_host.numbers()) == 21, "the first process writes for the second")
    assert proxy.accepted == 1
    far_host.assert_written_once(21)


@pytest.mark.parametrize("ending", [signal.SIGKILL, None])
def test_when_the_flusher_ends_another_running_process_takes_over(
    host: Host, processes: ExitStack, ending: signal.Signals | None
):
    first = obedient(host, processes, 0)
    wait_until(lambda: flusher_pid(host) == first.pid, "the first process flushes")
    second = obedient(host, processes, 1)
    wait_until(lambda: host.numbers() == [0, 1], "it writes for the second too")
    assert flusher_pid(host) == first.pid
    if ending is None:
        first.communicate(timeout=60)
        assert first.returncode == 0
    else:
        first.send_signal(ending)
        first.wait(60)
    say(second, 2)
    wait_until(lambda: host.numbers() == [0, 1, 2], "the second process writes")
    assert flusher_pid(host) == second.pid


FORK = """
import os, sys
from helena_cli import add_operation, flush
add_operation("insert", "numbers", {"n": 0})
assert flush(30)
child = os.fork() == 0
for n in range(2 - child, 41, 2):
    add_operation("insert", "numbers", {"n": n})
if not child:
    _, status = os.wait()
    assert status == 0
    print("forked", flush=True)
    sys.stdin.read()
"""


def test_a_forked_child_shares_neither_connection_nor_lease_and_loses_nothing(
    far_host: Host, proxy: Proxy, processes: ExitStack
):
    parent = processes.enter_context(far_host.start(FORK))
    processes.callback(parent.kill)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "forked\n"
    wait_until(lambda: len(far_host.numbers()) == 41, "the parent writes for its child")
    assert flusher_pid(far_host) == parent.pid
    assert lease_of(far_host).held_by_anyone()
    _, errors = parent.communicate(timeout=60)
    assert (parent.returncode, errors) == (0, "")
    # The child has not ended the parent's connection on its way out.
    assert proxy.accepted == 1
    far_host.assert_written_once(41)


def test_a_forked_child_that_outlives_its_parent_does_not_keep_the_lease(
    host: Host, processes: ExitStack
):
    script = """
import os, sys
from helena_cli import add_operation, flush
add_operation("insert", "numbers", {"n": 0})
assert flush(30)
if os.fork():
    os.kill(os.getpid(), 9)
print("alive", flush=True)
sys.stdin.readline()
add_operation("insert", "numbers", {"n": 1})
print("done", flush=True)
"""
    parent = processes.enter_context(host.start(script))
    assert parent.stdin is not None
    assert parent.stdout is not None
    assert parent.wait(60) == -signal.SIGKILL
    assert parent.stdout.readline() == "alive\n"
    assert not lease_of(host).held_by_anyone()
    print(file=parent.stdin, flush=True)
    assert parent.stdout.readline() == "done\n"
    wait_until(lambda: host.numbers() == [0, 1], "the child writes")


def test_children_forked_while_threads_add_and_flush_lose_and_double_nothing(host: Host):
    script = """
import os, threading
from helena_cli import add_operation, flush

def add(first, count):
    for n in range(first, first + count):
        add_operation("insert", "numbers", {"n": n})

threads = [threading.Thread(target=add, args=(number * 300, 300)) for number in range(2)]
for thread in threads:
    thread.start()
for number in range(10):
    if os.fork() == 0:
        add(600 + number * 20, 20)
        os._exit(0)
for thread in threads:
    thread.join()
for number in range(10):
    assert os.wait()[1] == 0
assert flush(60)
"""
    result = host.run(script, HELENA_BATCH_SIZE="10")
    assert (result.returncode, result.stderr) == (0, "")
    host.assert_written_once(800)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_of_multiprocessing_write_at_their_end(host: Host, method: str):
    script = """
import multiprocessing, sys
import helena_cli

def add(first):
    for n in range(first, first + 20):
        helena_cli.add_operation("insert", "numbers", {"n": n})

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    children = [context.Process(target=add, args=(20 * number,)) for number in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
"""
    result = host.run(script, method, HELENA_BATCH_INTERVAL="3600")
    assert (result.returncode, result.stderr) == (0, "")
    host.assert_written_once(40)


def test_a_child_of_multiprocessing_that_outlives_its_parent_writes_at_its_end(host: Host):
    script = """
import multiprocessing, os, time
from helena_cli import add_operation, flush

def add():
    parent = os.getppid()
    print("alive", flush=True)
    while os.getppid() == parent:
        time.sleep(0.01)
    add_operation("insert", "numbers", {"n": 1})

add_operation("insert", "numbers", {"n": 0})
assert flush(30)
child = multiprocessing.get_context("fork").Process(target=add)
child.start()
input()
os.kill(os.getpid(), 9)
"""
    with host.start(script, HELENA_BATCH_INTERVAL="3600") as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "alive\n"
        # Its end: the child keeps the pipe open as long as it lives.
        _, errors = parent.communicate("\n", timeout=60)
    assert (parent.returncode, errors) == (-signal.SIGKILL, "")
    host.assert_written_once(2)


def test_an_engine_of_ones_own_writes_in_a_child_that_outlives_its_parent(host: Host):
    script = """
import os, time
from helena_cli import BatchEngine
engine = BatchEngine()
engine.add_operation("insert", "numbers", {"n": 0})
assert engine.flush(30)
parent = os.getpid()
if os.fork():
    os.kill(parent, 9)
while os.getppid() == parent:
    time.sleep(0.01)
engine.add_operation("insert", "numbers", {"n": 1})
engine.close()
"""
    with host.start(script, HELENA_BATCH_INTERVAL="3600") as parent:
        _, errors = parent.communicate(timeout=60)
    assert (parent.returncode, errors) == (-signal.SIGKILL, "")
    host.assert_written_once(2)


def test_a_coroutine_never_waits_for_the_database(
    far_host: Host, proxy: Proxy, processes: ExitStack
):
    script = """
import asyncio, sys
from helena_cli import add_operation

async def main():
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        add_operation("insert", "numbers", {"n": int(line)})
        print(line, end="", flush=True)

asyncio.run(main())
"""
    process = processes.enter_context(far_host.start(script))
    processes.callback(process.kill)
    say(process, 0)
    wait_until(lambda: far_host.numbers() == [0], "the line works")
    proxy.stalled = True
    for number in range(1, 301):
        say(process, number)
    # The calls have returned, and nothing that they queued can have been written.
    assert far_host.numbers() == [0]
    assert proxy.stalled
    proxy.stalled = False
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    far_host.assert_written_once(301)
