"""Sixteen processes write as fast as they can, and the queue has a limit."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.hosts import Host
from tests.proxy import Proxy

pytestmark = [pytest.mark.acceptance, pytest.mark.postgres, pytest.mark.slow]

PRODUCERS = 16

#: No key of these tables would hide a row that was written twice, but that of the hot rows.
TABLES = """
CREATE TABLE load_log (producer int, n int CHECK (n % 100 <> 0), note text);
CREATE TABLE load_parents (id text PRIMARY KEY);
CREATE TABLE load_children (producer int, n int, parent text REFERENCES load_parents);
CREATE TABLE load_hot (k int PRIMARY KEY, operation text, changes int NOT NULL DEFAULT 1);
"""

#: Forks the producers; each notes the operations that were accepted: id, table, number.
LOAD = """
import os, sys, time
from pathlib import Path
from helena_cli import add_operation
from helena_cli.database import writer
from helena_cli.errors import SpoolFull
notes, seconds = Path(sys.argv[1]), float(sys.argv[2])

def operation(p, n):
    if n % 50 == 1:
        # Its parent comes thirty operations later.
        return "insert", "load_children", {"producer": p, "n": n, "parent": f"{p}-{n + 30}"}
    if n % 50 == 31:
        return "insert", "load_parents", {"id": f"{p}-{n}"}
    if n % 5 == 2:
        return "update", "load_hot", {"k": n % 3, "operation": f"{p}-{n}"}
    note = "x" * (1_000_000 if n % 1000 == 3 else 100)
    return "insert", "load_log", {"producer": p, "n": n, "note": note}

def add(kind, table, data):
    while True:
        try:
            return add_operation(kind, table, data)
        except SpoolFull:
            # The database is slower than all of them together.
            time.sleep(0.1)

def produce(p):
    until, n = time.monotonic() + seconds, 0
    # The last child gets its parent too.
    with open(notes / str(p), "w") as file:
        while time.monotonic() < until or n % 50 > 1 and n % 50 <= 31:
            kind, table, data = operation(p, n)
            number = add(kind, table, data)
            file.write(f"{number} {table} {n}\\n")
            n += 1

children = []
for p in range(int(sys.argv[3])):
    pid = os.fork()
    if not pid:
        code = 1
        try:
            produce(p)
            code = 0
        finally:
            sys.excepthook(*sys.exc_info()) if code else None
            os._exit(code)
    children.append(pid)
sys.exit(any(os.waitpid(pid, 0)[1] for pid in children))
"""

#: Adds until the queue refuses, ten times over; notes what was accepted.
FILL = """
import os, sys, time
from helena_cli import add_operation
from helena_cli.errors import SpoolFull
accepted = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
refusals, n = 0, int(sys.argv[2])
while refusals < 10:
    try:
        add_operation("insert", "numbers", {"n": n, "note": "x" * 500})
        os.write(accepted, b"%d\\n" % n)
    except SpoolFull as error:
        refusals += 1
        assert "max_bytes" in error.remedy, error.remedy
    n += 1
print("full")
"""


def test_sixteen_producers_at_full_speed_lose_double_and_mix_up_nothing(
    host: Host, tmp_path: Path, minutes: float, figures: Counter[str]
):
    host.sql(TABLES)
    # The rest of the time is needed to write what is queued by then, which the limit keeps small.
    seconds = max(1.0, minutes * 60 - 30)
    host.variables["HELENA_SPOOL_MAX_BYTES"] = str(256 * 2**20)
    # Larger batches than the default: one processor has to write what all of them accept.
    with (
        host.start(LOAD, tmp_path, seconds, PRODUCERS, HELENA_BATCH_SIZE="1000") as process,
        host.runtime() as runtime,
    ):
        runtime.engine.start()
        _, errors = process.communicate(timeout=120 + seconds)
        assert process.returncode == 0, errors
        assert runtime.engine.flush(120), runtime.engine.failure
        # Children that were put back are due at their time only.
        runtime.spool.release_held(o.id for o in runtime.spool.queued("load_children"))
        assert runtime.engine.flush(120), runtime.engine.failure
        letters = runtime.spool.dead_letters()
    dead = [(letter.table, json.loads(letter.data)) for letter in letters]
    accepted = read_notes(tmp_path)
    assert_rows(host, accepted, dead)
    assert_hot_rows(host, accepted)
    law = host.law()
    assert (law.accepted, law.spooled, law.dead) == (len(accepted), 0, len(dead))
    figures["operations checked: sixteen producers"] += len(accepted)


#: Id of the operation, table, producer, number.
Note = tuple[int, str, int, int]


def read_notes(folder: Path) -> list[Note]:
    """Every operation that was accepted."""
    notes = []
    for file in folder.iterdir():
        for line in file.read_text().splitlines():
            number, table, n = line.split()
            notes.append((int(number), table, int(file.name), int(n)))
    return notes


def assert_rows(host: Host, accepted: list[Note], dead: list[tuple[str, dict[str, int]]]) -> None:
    """Each row once, in its table or among the dead letters when the database refuses it."""
    assert {table for table, _ in dead} <= {"load_log"}
    assert len({number for number, *_ in accepted}) == len(accepted)
    refused = Counter((row["producer"], row["n"]) for _, row in dead)
    for table, query in {
        "load_log": "SELECT producer, n FROM load_log",
        "load_children": "SELECT producer, n FROM load_children",
        "load_parents": "SELECT split_part(id, '-', 1)::int, split_part(id, '-', 2)::int"
        " FROM load_parents",
    }.items():
        found = Counter((p, n) for p, n in host.sql(query))
        wanted = Counter((p, n) for _, name, p, n in accepted if name == table)
        if table == "load_log":
            assert refused == Counter({(p, n): 1 for p, n in wanted if n % 100 == 0})
            found += refused
        assert not wanted - found, f"{table} lost: {sorted(wanted - found)[:20]}"
        assert not found - wanted, f"{table} has too much: {sorted(found - wanted)[:20]}"


def assert_hot_rows(host: Host, accepted: list[Note]) -> None:
    """Each holds what was accepted last for it, of whichever process."""
    last: dict[int, str] = {}
    for _, table, producer, n in sorted(accepted):
        if table == "load_hot":
            last[n % 3] = f"{producer}-{n}"
    assert dict(host.sql("SELECT k, operation FROM load_hot")) == last


def test_a_full_queue_tells_its_callers_and_drops_nothing(
    far_host: Host, proxy: Proxy, tmp_path: Path, figures: Counter[str]
):
    limits = {"HELENA_SPOOL_MAX_BYTES": "2097152", "HELENA_BATCH_SHUTDOWN_TIMEOUT": "0.5"}
    with far_host.runtime() as runtime:
        runtime.engine.add_operation("insert", "numbers", {"n": -1})
        assert runtime.engine.flush(60)
    notes = tmp_path / "accepted"
    proxy.stop()
    first = far_host.run(FILL, notes, 0, **limits)
    assert (first.returncode, first.stdout) == (0, "full\n"), first.stderr
    # Another process finds it full as well, though it has measured nothing yet.
    second = far_host.run(FILL, notes, 1_000_000, **limits)
    assert (second.returncode, second.stdout) == (0, "full\n"), second.stderr
    accepted = sorted(map(int, notes.read_text().split()))
    size = sum(path.stat().st_size for path in far_host.state_dir.glob("*.spool*"))
    assert size < 8 * 2**20, "the queue does not grow past its limit"
    proxy.start()
    with far_host.runtime() as runtime:
        assert runtime.engine.flush(60), runtime.engine.failure
        # There is room again.
        runtime.engine.add_operation("insert", "numbers", {"n": 10_000_000})
        assert runtime.engine.flush(60)
    assert far_host.numbers() == [-1, *accepted, 10_000_000]
    figures["operations checked: a full queue"] += len(accepted)
