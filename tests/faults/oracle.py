"""Knows what was accepted, from notes kept outside Helena, and what must have become of it."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from helena_cli.runtime import Runtime
from tests.faults.victims import accepted_together, is_bad, operation
from tests.hosts import Host, wait_until

#: No table has a key that would hide a row written twice, but those that are about keys. What
#: happens to those is written down by a trigger.
TABLES = """
CREATE TABLE fault_log (producer int, n int CHECK (n >= 0));
CREATE TABLE fault_parents (id text PRIMARY KEY);
CREATE TABLE fault_children (producer int, n int, parent text REFERENCES fault_parents);
CREATE TABLE fault_messages (id text PRIMARY KEY, n int);
CREATE TABLE fault_keys (k int PRIMARY KEY, n int, middle int);
CREATE TABLE fault_heirs (k int PRIMARY KEY, n int, parent text REFERENCES fault_parents);
CREATE TABLE fault_history (at bigserial, k int, n int);
CREATE FUNCTION fault_note() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN INSERT INTO fault_history (k, n) VALUES (NEW.k, NEW.n); RETURN NEW; END';
CREATE TRIGGER fault_note BEFORE INSERT OR UPDATE ON fault_keys
    FOR EACH ROW EXECUTE FUNCTION fault_note();
CREATE TRIGGER fault_note BEFORE INSERT OR UPDATE ON fault_heirs
    FOR EACH ROW EXECUTE FUNCTION fault_note();
"""

#: Every row that has a key, with the columns that operations give. No key is in both tables.
KEYS = (
    "SELECT k, n, middle, NULL FROM fault_keys UNION ALL SELECT k, n, NULL, parent FROM fault_heirs"
)


class Oracle:
    """Checks the tables of a host against the notes of its processes."""

    def __init__(self, host: Host, notes: Path) -> None:
        self._host = host
        self._notes = notes
        self._dead: list[tuple[int, int]] = []

    def check(self) -> int:
        """Drain, and check every operation that was ever accepted; how many there were."""
        with self._host.runtime() as runtime:
            wait_until(lambda: self._has_drained(runtime), "children that are put back")
            letters = runtime.spool.dead_letters()
            lanes = [lane for lane in runtime.spool.lanes() if lane.reason]
        assert not lanes, lanes
        dead = [(letter.table, json.loads(letter.data)) for letter in letters]
        self._dead = [(row["producer"], -1 - row["n"]) for table, row in dead]
        assert {table for table, _ in dead} <= {"fault_log"}, dead
        accepted = self._accepted()
        self._check_rows(accepted)
        self._check_keys(accepted)
        self._check_law(sum(accepted.values()))
        return sum(accepted.values())

    def _has_drained(self, runtime: Runtime) -> bool:
        """Whether everything is written; children that are put back are due at their time only.

        One that is being tried at this moment may be put back once more, behind an earlier one.
        """
        waiting = False
        for table in ("fault_children", "fault_heirs"):
            ids = [operation.id for operation in runtime.spool.queued(table)]
            runtime.spool.release_held(ids)
            waiting = waiting or bool(ids)
        assert runtime.engine.flush(120), runtime.engine.failure
        return not waiting

    def _accepted(self) -> dict[int, int]:
        """Process → how many of its operations were accepted.

        Its last call may have been answered by Helena and not noted: then all of it is there, or
        nothing.
        """
        last = self._last_seen()
        accepted = {}
        for file in self._notes.iterdir():
            producer = int(file.name)
            noted = int((file.read_text().split() or ["0"])[-1])
            more = accepted_together(producer, noted)
            accepted[producer] = noted + (more if last.get(producer, -1) >= noted else 0)
        return accepted

    def _last_seen(self) -> dict[int, int]:
        """Process → the number of its last operation that is anywhere."""
        last: dict[int, int] = {}
        parents = self._parents()
        keys = [(k // 10 if k > 0 else -k, n) for k, n, *_ in self._host.sql(KEYS)]
        messages = [
            (int(id.split("-")[0]), n)
            for id, n in self._host.sql("SELECT id, n FROM fault_messages")
        ]
        rows = [*self._log(), *self._children(), *parents, *keys, *messages, *self._dead]
        for producer, n in rows:
            last[producer] = max(last.get(producer, -1), n)
        return last

    def _check_rows(self, accepted: dict[int, int]) -> None:
        """Each row is there, and each once."""
        by_table: dict[str, list[tuple[int, int]]] = {}
        dead = []
        for producer, count in accepted.items():
            for n in range(count):
                if is_bad(producer, n):
                    dead.append((producer, n))
                else:
                    table = operation(producer, n)[1]
                    by_table.setdefault(table, []).append((producer, n))
        _assert_same("log", self._log(), by_table.get("fault_log", ()))
        _assert_same("children", self._children(), by_table.get("fault_children", ()))
        _assert_same("parents", self._parents(), by_table.get("fault_parents", ()))
        _assert_same("dead letters", self._dead, dead)
        # Of two messages with one id the first stays.
        first: dict[str, int] = {}
        for producer, n in sorted(by_table.get("fault_messages", ())):
            first.setdefault(operation(producer, n)[2]["id"], n)
        messages = self._host.sql("SELECT id, n FROM fault_messages")
        _assert_same("messages", messages, first.items())

    def _check_keys(self, accepted: dict[int, int]) -> None:
        """Each column holds its last value, and never held an older one after a newer one."""
        last: dict[int, dict[str, Any]] = {}
        for producer, count in accepted.items():
            for n in range(count):
                _, table, data = operation(producer, n)
                if table in ("fault_keys", "fault_heirs"):
                    last.setdefault(data["k"], {}).update(data)
        wanted = [(k, r["n"], r.get("middle"), r.get("parent")) for k, r in last.items()]
        _assert_same("keys", self._host.sql(KEYS), wanted)
        before: dict[int, int] = {}
        for k, n in self._host.sql("SELECT k, n FROM fault_history ORDER BY at"):
            assert before.get(k, -1) <= n, f"key {k}: {n} after {before[k]}"
            before[k] = n

    def _check_law(self, accepted: int) -> None:
        law = self._host.law()
        assert law.accepted == accepted, law
        assert law.dead == len(self._dead), law
        assert law.spooled == law.dropped == 0, law

    def _log(self) -> list[tuple[int, int]]:
        return [(p, n) for p, n in self._host.sql("SELECT producer, n FROM fault_log")]

    def _children(self) -> list[tuple[int, int]]:
        return [(p, n) for p, n in self._host.sql("SELECT producer, n FROM fault_children")]

    def _parents(self) -> list[tuple[int, int]]:
        rows = [id.split("-") for (id,) in self._host.sql("SELECT id FROM fault_parents")]
        return [(int(producer), int(n)) for producer, n in rows]


def _assert_same(what: str, found: Iterable[Any], expected: Iterable[Any]) -> None:
    there, wanted = Counter(map(tuple, found)), Counter(map(tuple, expected))
    assert not wanted - there, f"{what} lost: {sorted(wanted - there)[:20]}"
    assert not there - wanted, f"{what} twice or too much: {sorted(there - wanted)[:20]}"
