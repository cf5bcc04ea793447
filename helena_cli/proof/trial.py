"""The stage of a trial: a schema and a state directory of its own, both removed afterwards."""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from helena_cli.runtime import Runtime
from helena_cli.settings import CheckSettings

if TYPE_CHECKING:
    from helena_cli.database.connection import Connection
    from helena_cli.database.scratch import Scratch

#: Accepts so many operations and is killed before it could write one.
_KILLED = """\
import json, sys
sys.path[:] = json.loads(sys.argv[4])
import os, signal
from pathlib import Path
from helena_cli.batch.spool import Spool
spool = Spool.open(Path(sys.argv[1]))
for n in range(int(sys.argv[3])):
    spool.append("insert", sys.argv[2], {"file_path": f"killed-{n}"})
os.kill(os.getpid(), signal.SIGKILL)
"""


#: Seconds for which a thread of a trial is waited for at a time: an interrupt that comes right
#: before a wait is only noticed after it.
WAIT = 0.2

#: What ends a trial, from the keyboard, by another process or with the terminal.
_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class CountedRuntime(Runtime):
    """A runtime that knows how many connections it opened, and how many at one time."""

    def connect(self, purpose: str) -> "Connection":
        """As of any runtime."""
        connection = super().connect(purpose)
        self.connections.append(connection)
        self.most = max(self.most, sum(not one.closed for one in self.connections))
        return connection

    @cached_property
    def connections(self) -> "list[Connection]":
        """All connections that were ever opened."""
        return []

    #: The most that were open at one time.
    most = 0


class Trial:
    """A context manager. What it makes is gone at its end, however that comes."""

    def __init__(self, runtime: Runtime) -> None:
        self._outer = runtime
        self._spool_ids: set[str] = set()
        self._stack = ExitStack()
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "Trial":
        for number in _ENDS:
            before = signal.getsignal(number)
            # Ignored is what `nohup` protects from; None was not installed from Python.
            if before not in (signal.SIG_IGN, None):
                self._handlers[number] = before
                signal.signal(number, signal.default_int_handler)
        self.folder = Path(tempfile.mkdtemp(prefix="helena-test-"))
        self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        return self

    def __exit__(self, *_: object) -> None:
        # A second one must not leave half of it behind.
        for number in self._handlers:
            signal.signal(number, signal.SIG_IGN)
        try:
            self._stack.close()
        finally:
            for number, before in self._handlers.items():
                signal.signal(number, before)

    @cached_property
    def connection(self) -> "Connection":
        """The trial's own connection. Raises DatabaseUnreachable."""
        return self._stack.enter_context(closing(self._outer.connect("test")))

    @cached_property
    def scratch(self) -> "Scratch":
        """The schema, made on first use. Raises DatabaseRefused."""
        from helena_cli.database.scratch import Scratch

        scratch = Scratch(self.connection)
        scratch.create()
        self._stack.callback(lambda: Scratch.drop(self._fresh(scratch), self._spool_ids))
        return scratch

    def _fresh(self, scratch: "Scratch") -> "Scratch":
        """The same schema over a connection that works: the trial's own may be lost."""
        from helena_cli.database.scratch import Scratch

        if not self.connection.closed and not self.connection.info.transaction_status:
            return scratch
        other = Scratch(self._stack.enter_context(closing(self._outer.connect("test"))))
        other.name = scratch.name
        return other

    @property
    def checks(self) -> CheckSettings:
        """The limits that the user has set."""
        return self._outer.settings.checks

    def connect(self, purpose: str) -> "Connection":
        """Another connection to the same database."""
        return self._outer.connect(purpose)

    @property
    def interval(self) -> float:
        """Seconds between two flushes, as the user has set it."""
        return self._outer.settings.batch.interval

    def place_of_queue(self) -> tuple[Path, int]:
        """Where the user's own queue lies, and how many operations wait in it.

        No operation is put into it. Raises SpoolError when it cannot be written.
        """
        spool = self._outer.spool
        spool.request_flush()
        return spool.path, spool.queue().total

    @contextmanager
    def session(self, purpose: str) -> "Iterator[Scratch]":
        """Another connection to the schema."""
        from helena_cli.database.scratch import Scratch

        with closing(self.connect(purpose)) as connection:
            session = Scratch(connection)
            session.name = self.scratch.name
            yield session

    @contextmanager
    def runtime(
        self, place: str = "", *, interval: float | None = None
    ) -> Iterator[CountedRuntime]:
        """A runtime with a queue of its own; the same `place` is the same queue."""
        settings = self._outer.settings
        batch = settings.batch
        own = replace(
            settings,
            state_dir=self.folder / (place or "queue"),
            database=replace(settings.database, dsn=self._outer.dsn()),
            batch=batch if interval is None else replace(batch, interval=interval),
        )
        with CountedRuntime(own) as runtime:
            self._spool_ids.add(runtime.spool.id)
            yield runtime

    def killed_writer(self, spool: Path, table: str, count: int) -> int:
        """Let a process accept operations and be killed at once; its exit status."""
        # Its modules are found where they were found here, whatever the current folder holds.
        code = ("-P", "-c", _KILLED)
        arguments = [sys.executable, *code, str(spool), table, str(count), json.dumps(sys.path)]
        done = subprocess.run(arguments, check=False, capture_output=True)
        return done.returncode
