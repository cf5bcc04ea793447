"""What runs inside the processes that are to die: it adds operations and notes what was accepted.

What a process adds follows from its number alone, so that a note of how many were accepted is
enough to say what must be in the tables.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from helena_cli import config, runtime
from helena_cli.batch.spool import Spool
from helena_cli.database import bulk_load, writer
from helena_cli.runtime import Runtime
from tests.faults import stops

#: Imported before the first fork: each child is spared the time.
assert writer

Operation = tuple[str, str, dict[str, Any]]

#: Seconds between two calls of a process.
PAUSE = 0.01

#: Seconds by which the clocks of processes are wrong.
WRONG = (0.0, 0.0, -7200.0, 7200.0)

#: Rows that go by COPY here: with as many as it takes elsewhere none of these flushes would use it.
COPIED = 4


def is_rough(producer: int) -> bool:
    """Whether its operations are put back or refused now and then.

    Without any such a flush takes them straight from the inbox.
    """
    return producer % 2 == 1


def is_bad(producer: int, n: int) -> bool:
    """Whether the database refuses the nth operation of a process."""
    return is_rough(producer) and n % 50 == 3


def key(producer: int, n: int) -> int:
    """The row that an update goes to: few, and each process has its own."""
    return producer * 10 + n // 10 % 3


def operation(producer: int, n: int) -> Operation:
    """The nth operation of a process."""
    last = n % 10
    if last == 7 and is_rough(producer):
        # Its parent comes with the next operation, and often with the next flush.
        parent = f"{producer}-{n + 1}"
        if n % 20 == 7:
            return "insert", "fault_children", {"producer": producer, "n": n, "parent": parent}
        return "update", "fault_heirs", {"k": -producer, "n": n, "parent": parent}
    if n % 20 == 0 and is_rough(producer):
        # It waits for the one before on its key, if that waits for its parent.
        return "update", "fault_heirs", {"k": -producer, "n": n}
    if last == 8:
        return "insert", "fault_parents", {"id": f"{producer}-{n}"}
    if last in (4, 5, 6):
        # One in the middle gives a column that the others leave alone.
        more = {"middle": n} if last == 5 else {}
        return "update", "fault_keys", {"k": key(producer, n), "n": n, **more}
    if last == 9:
        # Every message comes twice; the second is left alone.
        return "message", "fault_messages", {"id": f"{producer}-{n // 20}", "n": n}
    return "insert", "fault_log", {"producer": producer, "n": -1 - n if is_bad(producer, n) else n}


def accepted_together(producer: int, n: int) -> int:
    """How many operations the process adds at once, all or none, when it has added n."""
    chance = random.Random(producer * 1_000_003 + n)
    size = 1 if chance.random() < 0.8 else chance.randrange(2, 40)
    # A child always comes with its parent, or it would wait for ever; and the second message never
    # comes alone, or nothing would show whether it was accepted.
    return size + ((n + size) % 10 == 8 or (size == 1 and n % 20 == 19))


def chunks(producer: int) -> Iterator[Sequence[Operation]]:
    """What the process adds, without end."""
    n = 0
    while True:
        size = accepted_together(producer, n)
        yield [operation(producer, i) for i in range(n, n + size)]
        n += size


def produce(
    add: Callable[..., object], extend: Callable[..., object], spool: Spool, order: dict[str, Any]
) -> None:
    """Add operations for ever; after each call note how many were accepted by then."""
    producer, n = order["producer"], 0
    with Path(order["notes"]).open("ab", buffering=0) as file:
        for chunk in chunks(producer):
            if len(chunk) == 1:
                add(*chunk[0])
            elif n % 3:
                extend(chunk)
            else:
                assert spool.accept_file(f"/{producer}/{n}", "", chunk)
            n += len(chunk)
            file.write(b"%d\n" % n)
            # Not where a step is waited for: what others look at goes another way.
            if order["flush"] and not order["step"]:
                meddle(spool, n)
            time.sleep(PAUSE)


def meddle(spool: Spool, n: int) -> None:
    """What changes nothing of what is accepted: dead letters die again, a child has a look."""
    if n % 7 == 0:
        spool.retry(letter.id for letter in spool.dead_letters()[:20])
    if n % 17 == 0:
        pid = os.fork()
        if pid == 0:
            spool.conservation()
            os._exit(0)
        os.waitpid(pid, 0)


def mistake_the_time(seconds: float) -> None:
    """Let the clock of this process be wrong."""

    def clock() -> float:
        return time.time() + seconds

    for owner, name in ((Spool, "open"), (runtime, "Cycle")):
        setattr(owner, name, partial(getattr(owner, name), clock=clock))


def live(order: dict[str, Any]) -> None:
    """Do what a child is ordered to until it is killed."""
    bulk_load.WORTHWHILE = COPIED
    if order["step"]:
        stops.arm(order["step"], order["skip"], order["halt"])
    else:
        mistake_the_time(WRONG[order["producer"] // 2 % len(WRONG)])
    parts = Runtime(config.load(environ=os.environ))
    if order["flush"]:
        engine = parts.engine
        engine.start()
        produce(engine.add_operation, engine.extend, parts.spool, order)
    else:
        produce(parts.spool.append, parts.spool.extend, parts.spool, order)


def main() -> None:
    """Fork a child for each order that comes in, and say its pid."""
    # Then nobody has to wait for them.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                live(json.loads(line))
            finally:
                sys.excepthook(*sys.exc_info())
                sys.stderr.flush()
                os._exit(1)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
