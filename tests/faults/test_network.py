"""The line to the database fails in every way, again and again; all is written exactly once."""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from tests.faults.crowd import Crowd
from tests.faults.oracle import TABLES, Oracle
from tests.hosts import Host, wait_until
from tests.proxy import Proxy

pytestmark = [pytest.mark.acceptance, pytest.mark.postgres, pytest.mark.slow]

Fault = Callable[[Proxy, random.Random], None]

#: What a flush says to the server, in this order: any answer may be lost.
REQUESTS = (b"BEGIN", b"helena.meta", b"spool_position", b"SAVEPOINT", b"INSERT INTO", b"COMMIT")

#: Longer than any of these tests waits.
FOR_EVER = 600.0


@pytest.fixture
def crowd(far_host: Host) -> Iterator[Crowd]:
    far_host.sql(TABLES)
    with Crowd(far_host) as crowd:
        yield crowd


def _cut(proxy: Proxy, chance: random.Random) -> None:
    proxy.cut()


def _refuse(proxy: Proxy, chance: random.Random) -> None:
    """Nobody listens for a while."""
    proxy.stop()
    time.sleep(chance.uniform(0, 0.5))
    proxy.start()


def _delay(proxy: Proxy, chance: random.Random) -> None:
    """A slow line for a while."""
    proxy.delay = chance.uniform(0.001, 0.1)
    time.sleep(chance.uniform(0, 1))
    proxy.delay = 0.0


def _stall(proxy: Proxy, chance: random.Random) -> None:
    """Silence in both directions, and then all that was meant to arrive."""
    proxy.stalled = True
    time.sleep(chance.uniform(0, 1))
    proxy.stalled = False


def _stall_and_cut(proxy: Proxy, chance: random.Random) -> None:
    proxy.stalled = True
    time.sleep(chance.uniform(0, 1))
    proxy.cut()
    proxy.stalled = False


def _half_open(proxy: Proxy, chance: random.Random) -> None:
    """The server hears and acts, its answers arrive no more, and at last the line breaks."""
    proxy.delay = FOR_EVER
    time.sleep(chance.uniform(0, 1))
    proxy.delay = 0.0
    proxy.cut()


def _lose(request: bytes, proxy: Proxy, chance: random.Random) -> None:
    """The server gets this request, and its answer is lost with the line."""
    proxy.drop_next_answer(request)
    assert proxy.dropped.wait(60), f"nobody has sent {request.decode()}"


FAULTS: tuple[Fault, ...] = (
    _cut,
    _refuse,
    _delay,
    _stall,
    _stall_and_cut,
    _half_open,
    *(partial(_lose, request) for request in REQUESTS),
)


def test_a_line_that_fails_in_every_way_loses_and_doubles_nothing(
    far_host: Host,
    proxy: Proxy,
    crowd: Crowd,
    minutes: float,
    seed: int,
    figures: Counter[str],
):
    chance = random.Random(seed)
    deadline = time.monotonic() + minutes * 60
    crowd.start(flush=True)
    crowd.start(flush=True, rough=True)
    rounds = 0
    while not rounds or time.monotonic() < deadline:
        for fault in chance.sample(FAULTS, len(FAULTS)):
            if rounds and time.monotonic() > deadline:
                break
            written = _written(far_host)
            fault(proxy, chance)
            figures["cuts survived: faults of the line"] += 1
            _await_flush(far_host, written, f"a flush after {fault}")
        rounds += 1
        far_host.law()
    _check(far_host, crowd, figures)


def test_a_flusher_killed_before_it_learns_of_its_commit_loses_and_doubles_nothing(
    far_host: Host,
    proxy: Proxy,
    crowd: Crowd,
    minutes: float,
    seed: int,
    figures: Counter[str],
):
    chance = random.Random(seed)
    deadline = time.monotonic() + minutes * 60
    rounds = 0
    while rounds < 5 or time.monotonic() < deadline:
        rounds += 1
        flusher = crowd.start(flush=True, rough=chance.random() < 0.3)
        written = _written(far_host)
        _await_flush(far_host, written, "a flush")
        if chance.random() < 0.5:
            # The answer is lost, and who waited for it dies before it can ask again.
            _lose(b"COMMIT", proxy, chance)
            crowd.kill(flusher)
        else:
            # It dies while it waits for an answer, of whatever request.
            proxy.delay = FOR_EVER
            time.sleep(chance.uniform(0, 0.2))
            crowd.kill(flusher)
            proxy.delay = 0.0
            proxy.cut()
        figures["crashes survived: processes that waited for the server"] += 1
    _check(far_host, crowd, figures)


def _written(host: Host) -> int:
    return int(host.sql("SELECT count(*) FROM fault_log")[0][0])


def _await_flush(host: Host, written: int, what: str) -> None:
    wait_until(lambda: _written(host) > written, what)


def _check(host: Host, crowd: Crowd, figures: Counter[str]) -> None:
    crowd.kill_all()
    figures["operations checked: cuts"] += Oracle(host, crowd.notes).check()
