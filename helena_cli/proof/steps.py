"""The steps of a trial: each shows one promise on the user's own database, or what is wrong."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from helena_cli.errors import HelenaError
from helena_cli.proof.step import Failed, NotTried, Step, told
from helena_cli.proof.trial import CountedRuntime, Trial

DOCUMENTS, USAGE, FILES = "es_document_references", "es_document_usage_log", "documents"

#: Seconds that a step may take before it counts as failed.
PATIENCE = 30.0

#: Rows that fill a pending list visibly.
PENDING_ROWS = 200

#: Operations that a killed process leaves behind.
LEFT_BEHIND = 100


class Steps:
    """All steps, in an order in which each relies on the ones before it."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self._pooled = False

    def run(self, tell: Callable[[str], None]) -> Iterator[Step]:
        """Do one after the other; `tell(name)` is called before each."""
        needed_failed = ""
        for name, needed, work in self._all():
            tell(name)
            if needed_failed:
                yield Step(name, False, f"not tried, because of: {needed_failed}", tried=False)
                continue
            try:
                yield Step(name, True, work())
            except NotTried as reason:
                yield Step(name, True, f"not tried: {reason}", tried=False)
            except HelenaError as error:
                yield Step(name, False, told(error))
                needed_failed = name if needed else ""

    def _all(self) -> tuple[tuple[str, bool, Callable[[], str]], ...]:
        """Name, whether all that follows needs it, and what is done."""
        return (
            ("connection", True, self._connection),
            ("tables of Helena", True, self._schema),
            ("keys of the known tables", False, self._keys),
            ("nobody in the way", False, self._nobody_in_the_way),
            ("place of the queue", False, self._place),
            ("scratch schema", True, self._scratch),
            ("write and read back", False, self._write),
            ("update", False, self._update),
            ("message", False, self._message),
            ("bad row among good ones", False, self._bad_row),
            ("parent that comes late", False, self._late_parent),
            ("killed process", False, self._killed_process),
            ("lost connection", False, self._lost_connection),
            ("lock, seen and cleared", False, self._lock),
            ("GIN pending list", False, self._pending_list),
        )

    def _connection(self) -> str:
        started = time.perf_counter()
        found = self._ask("SELECT pg_backend_pid() AS pid, version() AS version")[0]
        took = (time.perf_counter() - started) * 1000
        # A pooler makes up the pid that it tells its clients.
        self._pooled = found["pid"] != self._trial.connection.info.backend_pid
        way = "through a pooler" if self._pooled else "no pooler in between"
        return f"{' '.join(found['version'].split()[:2])}, answers in {took:.1f} ms, {way}"

    def _schema(self) -> str:
        from helena_cli.database import schema

        return f"prepared, id {schema.target_id(self._trial.connection)}"

    def _keys(self) -> str:
        from helena_cli.database.scratch import KEYS, Scratch

        found = Scratch(self._trial.connection).tables()
        missing = [name for name in KEYS if name not in found]
        if missing:
            raise Failed(f"{', '.join(missing)}: not there.", "Run: helena init.")
        for name, key in KEYS.items():
            if not any(set(known) == set(key) for known in found[name].keys):
                columns = ", ".join(key)
                raise Failed(
                    f"{name} has no usable unique key over ({columns}).",
                    f"Create it: CREATE UNIQUE INDEX ON {name} ({columns}).",
                )
        return f"each of the {len(KEYS)} tables has the key that its operations go by"

    def _nobody_in_the_way(self) -> str:
        from helena_cli.database.scratch import Scratch

        found = Scratch(self._trial.connection).locked()
        if found:
            table, pid, seconds = found[0]
            raise Failed(
                f"{table} has been locked against everybody by pid {pid} for {seconds:.0f} s.",
                "See who it is: helena status; free it: helena clear-locks.",
            )
        return "no known table is locked against everybody"

    def _place(self) -> str:
        path, waiting = self._trial.place_of_queue()
        return f"{path} can be written; {waiting:,} operations wait there"

    def _scratch(self) -> str:
        return f"{self._trial.scratch.name}, dropped at the end"

    def _write(self) -> str:
        rows = [self._document(n, metadata={"n": n, "text": "é ✓ \\ '"}) for n in range(10)]
        self._queue(("insert", DOCUMENTS, row) for row in rows)
        found = self._trial.scratch.rows(DOCUMENTS, "es_doc_id", [r["es_doc_id"] for r in rows])
        for row, there in zip(rows, found, strict=False):
            for column, value in row.items():
                if there[column] != value:
                    raise Failed(f"{column} came back as {there[column]!r} instead of {value!r}.")
        if len(found) != len(rows):
            raise Failed(f"{len(found)} of {len(rows)} rows came back.")
        return f"{len(rows)} rows came back as they were given"

    def _update(self) -> str:
        self._queue([("update", DOCUMENTS, {"es_doc_id": "trial-1", "doc_type": "changed"})])
        row = self._trial.scratch.rows(DOCUMENTS, "es_doc_id", ["trial-1"])[0]
        if (row["doc_type"], row["metadata"]["n"]) != ("changed", 1):
            raise Failed("the other columns did not stay as they were.")
        return "one column changed, the others stayed"

    def _message(self) -> str:
        first, second = (
            {"id": "trial", "sender": "helena test", "message_type": "TEST", "content": text}
            for text in ("first", "second")
        )
        self._queue([("message", "messages", first)])
        self._queue([("message", "messages", second)])
        found = self._trial.scratch.rows("messages", "id", ["trial"])
        if [row["content"] for row in found] != ["first"]:
            raise Failed("a message whose id existed was not left alone.")
        return "appended once; one with the same id is left alone"

    def _bad_row(self) -> str:
        good = [self._document(n) for n in range(100, 120)]
        bad = self._document(999) | {"data_classification": "no such class"}
        with self._trial.runtime() as runtime:
            before = runtime.spool.conservation().dead
            self._add(
                runtime, (("insert", DOCUMENTS, row) for row in [*good[:10], bad, *good[10:]])
            )
            runtime.drain()
            letters = runtime.spool.dead_letters()
            dead = runtime.spool.conservation().dead - before
            runtime.spool.drop([letter.id for letter in letters])
        found = self._trial.scratch.rows(DOCUMENTS, "es_doc_id", [r["es_doc_id"] for r in good])
        if len(found) != len(good) or dead != 1:
            raise Failed(f"{len(found)} of {len(good)} good rows were written, {dead} buried.")
        return f"{len(good)} written, 1 dead letter (SQLSTATE {letters[-1].sqlstate})"

    def _late_parent(self) -> str:
        child = {"es_doc_id": "trial-late", "accessed_by": "helena test"}
        with self._trial.runtime(interval=0.5) as runtime:
            self._add(runtime, [("insert", USAGE, child)])
            runtime.drain()
            if self._trial.scratch.count(USAGE):
                raise NotTried("this table has no foreign key")
            self._add(runtime, [("insert", DOCUMENTS, self._document("late"))])
            self._wait_for(
                lambda: self._trial.scratch.count(USAGE) == 1, "the child was not written"
            )
        return "the child waited, and was written after its parent"

    def _killed_process(self) -> str:
        with self._trial.runtime("killed") as runtime:
            path = runtime.spool.path
        table = self._trial.scratch.table(FILES)
        self._trial.killed_writer(path, table, LEFT_BEHIND)
        with self._trial.runtime("killed") as runtime:
            accepted = runtime.spool.conservation().accepted
            runtime.drain()
        written = self._trial.scratch.count(FILES)
        if not accepted == written == LEFT_BEHIND:
            raise Failed(
                f"of {LEFT_BEHIND} operations {accepted} survived, {written} were written."
            )
        return f"{LEFT_BEHIND} operations of a process killed by SIGKILL are all there, once"

    def _lost_connection(self) -> str:
        with self._trial.runtime() as runtime:
            self._add(runtime, [("insert", DOCUMENTS, self._document(200))])
            runtime.drain()
            if not self._end_sessions(runtime):
                raise NotTried("behind a pooler the session is not known")
            self._add(runtime, [("insert", DOCUMENTS, self._document(201))])
            self._wait_for(
                lambda: bool(self._trial.scratch.rows(DOCUMENTS, "es_doc_id", ["trial-201"])),
                "nothing was written after the connection was lost",
            )
        return "its session was terminated; the next flush made another one"

    def _end_sessions(self, runtime: CountedRuntime) -> bool:
        if self._pooled:
            return False
        pids = [c.info.backend_pid for c in runtime.connections if not c.closed]
        self._ask("SELECT pg_terminate_backend(pid) FROM unnest(%s::int[]) AS pid", [pids])
        return bool(pids)

    def _lock(self) -> str:
        from helena_cli.database import clearing, locks, relief

        with self._lock_holder() as pid, self._trial.runtime() as runtime:
            self._add(runtime, [("insert", DOCUMENTS, self._document(300))])
            flushing = threading.Thread(target=runtime.engine.flush, args=(PATIENCE,))
            flushing.start()
            server = locks.reach(runtime.target)
            try:
                scope = relief.Scope(pids=frozenset({pid}))
                self._wait_for(lambda: locks.look(server).edges(), "the lock was not seen")
                plan = relief.make_plan(locks.look(server), scope)
                done = clearing.apply(server, plan.actions)
            finally:
                server.connection.close()
            if not done or not all(one.succeeded for one in done):
                raise Failed(f"the lock was not cleared: {[one.result for one in done]}.")
            flushing.join(PATIENCE)
            runtime.drain()
        if not self._trial.scratch.rows(DOCUMENTS, "es_doc_id", ["trial-300"]):
            raise Failed("the operation that waited was not written.")
        return f"the session was {done[0].result}, what waited was written"

    @contextmanager
    def _lock_holder(self) -> Iterator[int]:
        """A session that idles in a transaction with the lock; its pid."""
        with self._trial.session("test lock") as holder:
            holder.hold(DOCUMENTS)
            yield holder.ask("SELECT pg_backend_pid() AS pid")[0]["pid"]

    def _pending_list(self) -> str:
        from helena_cli.database.scratch import upsert

        scratch = self._trial.scratch
        rows = [self._document(n) for n in range(1000, 1000 + PENDING_ROWS)]
        upsert(self._trial.connection, scratch.table(DOCUMENTS), rows)
        cleaned = scratch.clean(DOCUMENTS)
        left = scratch.pending_pages(DOCUMENTS)
        if not cleaned or left:
            raise Failed(f"{cleaned} pages were emptied, {left} are left.")
        return f"{cleaned} pages after {PENDING_ROWS} rows, emptied"

    # Tools

    def _ask(self, query: str, values: list[Any] | None = None) -> list[dict[str, Any]]:
        from helena_cli.database.scratch import Scratch

        return Scratch(self._trial.connection).ask(query, values or [])

    def _document(self, n: int | str, **more: Any) -> dict[str, Any]:
        return {
            "es_index": "helena_test",
            "es_doc_id": f"trial-{n}",
            "tags": ["markdown", f"tag-{n}"],
            "metadata": {"n": n},
            "indexed_at": datetime.now(UTC).replace(tzinfo=None),
            **more,
        }

    def _queue(self, operations: Any) -> None:
        """Queue and write."""
        with self._trial.runtime() as runtime:
            self._add(runtime, operations)
            runtime.drain()
            dead = runtime.spool.dead_letters()
        if dead:
            raise Failed(f"{len(dead)} became dead letters: {dead[0].message}.")

    def _add(self, runtime: CountedRuntime, operations: Any) -> None:
        table = self._trial.scratch.table
        runtime.engine.add_operations((kind, table(name), row) for kind, name, row in operations)

    def _wait_for(self, condition: Callable[[], object], otherwise: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                raise Failed(f"{otherwise} within {PATIENCE:.0f} s.")
            time.sleep(0.05)
