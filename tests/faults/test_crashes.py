"""Processes and servers die at random moments and at every step; all is written exactly once."""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator

import psutil
import psycopg
import pytest

from helena_cli.database import schema
from tests.cluster import Cluster
from tests.faults.crowd import Crowd
from tests.faults.oracle import TABLES, Oracle
from tests.faults.stops import COMMIT_SENT, FLUSHING, ROUGH, SMOOTH, STEPS
from tests.hosts import Host, wait_until

pytestmark = [pytest.mark.acceptance, pytest.mark.postgres, pytest.mark.slow]


@pytest.fixture
def crowd(host: Host) -> Iterator[Crowd]:
    host.sql(TABLES)
    with Crowd(host) as crowd:
        yield crowd


def test_a_process_killed_at_any_step_loses_and_doubles_nothing(
    host: Host, crowd: Crowd, minutes: float, seed: int, figures: Counter[str]
):
    chance = random.Random(seed)
    deadline = time.monotonic() + minutes * 60
    crowd.start(flush=False)
    wait_until(host.spools, "a spool")
    # Once each, however little time there is.
    rounds = 0
    while not rounds or time.monotonic() < deadline:
        for step in chance.sample(STEPS, len(STEPS)):
            if rounds and time.monotonic() > deadline:
                break
            rough = chance.random() < 0.2 and not step.endswith(SMOOTH)
            rough = rough or needs_rough(step)
            skip = chance.choice((0, 1, 2, 4, 8))
            flusher = crowd.start(flush=True, rough=rough, step=step, skip=skip)
            if chance.random() < 0.2:
                host.law()
            crowd.wait_gone(flusher, step)
            figures["crashes survived: processes at a step"] += 1
        rounds += 1
    _check(host, crowd, figures)


def test_processes_killed_at_any_moment_lose_and_double_nothing(
    host: Host, crowd: Crowd, minutes: float, seed: int, figures: Counter[str]
):
    chance = random.Random(seed)
    deadline = time.monotonic() + minutes * 60
    alive = [crowd.start(flush=True) for _ in range(3)]
    wait_until(host.spools, "a spool")
    kills = 0
    while kills < 10 or time.monotonic() < deadline:
        for _ in range(3):
            time.sleep(chance.uniform(0, 0.1))
            # A look brings into the tables what a flusher has taken from the inbox.
            host.law()
        victim = alive.pop(chance.randrange(len(alive)))
        crowd.kill(victim)
        kills += 1
        alive.append(crowd.start(flush=chance.random() < 0.8, rough=chance.random() < 0.15))
    figures["crashes survived: processes at a moment"] += kills
    _check(host, crowd, figures)


def test_flushers_that_die_again_and_again_before_their_commit_stop_no_lane(
    host: Host, crowd: Crowd, figures: Counter[str]
):
    # This commit is found in the database only: nobody was there to learn of it.
    crowd.wait_gone(crowd.start(flush=True, step=COMMIT_SENT, skip=2))
    for _ in range(20):
        crowd.wait_gone(crowd.start(flush=True, step="before COMMIT"))
        figures["crashes survived: processes at a step"] += 1
    _check(host, crowd, figures)


@pytest.fixture
def server(own_server: Cluster) -> Cluster:
    own_server.start()
    with psycopg.connect(own_server.dsn, autocommit=True) as connection:
        schema.initialise(connection)
        connection.execute(TABLES)
    return own_server


def _terminate_backend(server: Cluster) -> None:
    with psycopg.connect(server.dsn, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE application_name = 'helena flush'"
        )


def _kill_backend(server: Cluster) -> None:
    """The server then restarts all of its sessions."""
    with psycopg.connect(server.dsn, autocommit=True) as connection:
        found = connection.execute(
            "SELECT pid FROM pg_stat_activity WHERE application_name = 'helena flush'"
        ).fetchall()
        for (pid,) in found:
            os.kill(pid, signal.SIGKILL)
        if found:
            # Not by a look at the new ones: this one must have noticed.
            with pytest.raises(psycopg.Error):
                while True:
                    connection.execute("SELECT 1")


def _kill_server(server: Cluster) -> None:
    lock = server.folder / "data" / "postmaster.pid"
    postmaster = psutil.Process(int(lock.read_text().split()[0]))
    everyone = [postmaster, *postmaster.children(recursive=True)]
    for process in everyone:
        process.kill()
    wait_until(lambda: not any(map(_lives, everyone)), "the end of the server")
    # Who would clear away its last remains may be slow, and its successor takes them for alive.
    for remains in (lock, *server.folder.glob(".s.PGSQL.*.lock")):
        remains.unlink()
    server.start()


def _lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def _stop_server_at_once(server: Cluster) -> None:
    server.restart("immediate")


FAULTS: tuple[Callable[[Cluster], None], ...] = (
    _terminate_backend,
    _kill_backend,
    _kill_server,
    _stop_server_at_once,
)


def test_a_server_that_fails_at_any_step_loses_and_doubles_nothing(
    server: Cluster, state_dir, minutes: float, seed: int, figures: Counter[str]
):
    chance = random.Random(seed)
    host = Host(server.dsn, state_dir)
    host.close()
    cases = [(step, fault) for step in SERVER_STEPS for fault in FAULTS]
    chance.shuffle(cases)
    # The short form has one case of each fault, and by its seed another step every time.
    first = list({fault: (step, fault) for step, fault in cases}.values())
    cases = first + [case for case in cases if case not in first]
    deadline = time.monotonic() + minutes * 60
    with Crowd(host) as crowd:
        done = 0
        while done < len(FAULTS) or time.monotonic() < deadline:
            step, fault = cases[done % len(cases)]
            _fail_at(step, fault, server, crowd, chance)
            done += 1
            figures["crashes survived: servers and backends at a step"] += 1
        host = Host(server.dsn, state_dir)
        try:
            _check(host, crowd, figures)
        finally:
            host.close()


#: Reading ahead needs more operations than one process adds.
SERVER_STEPS = (
    *(
        f"{when} {step}"
        for step in FLUSHING
        if step != "read ahead"
        for when in ("before", "after")
    ),
    COMMIT_SENT,
)


def needs_rough(step: str) -> bool:
    """Whether it needs an operation that is put back or refused to come to a step."""
    return step.endswith(ROUGH)


def _fail_at(
    step: str,
    fault: Callable[[Cluster], None],
    server: Cluster,
    crowd: Crowd,
    chance: random.Random,
) -> None:
    """Let the server fail while a flusher is at a step; it has to go on by itself."""
    skip, rough = chance.randrange(3), needs_rough(step)
    pid = crowd.start(flush=True, rough=rough, step=step, skip=skip, halt="SIGSTOP")
    crowd.wait_stopped(pid)
    fault(server)
    before = wait_until(lambda: _written(server), "the server")
    os.kill(pid, signal.SIGCONT)
    wait_until(lambda: _written(server) > before, f"a flush after {fault.__name__} {step}")
    crowd.kill(pid)


def _written(server: Cluster) -> int:
    """How much was written so far, counted from 1; 0 when the server does not answer."""
    try:
        with psycopg.connect(server.dsn) as connection:
            row = connection.execute("SELECT count(*) + 1 FROM fault_log").fetchone()
    except psycopg.OperationalError:
        return 0
    return row[0] if row else 0


def _check(host: Host, crowd: Crowd, figures: Counter[str]) -> None:
    crowd.kill_all()
    figures["operations checked: crashes"] += Oracle(host, crowd.notes).check()
