"""The library: what `from helena_cli import …` gives to scripts and services."""

import atexit
import logging
import threading
from collections.abc import Iterable, Mapping
from typing import Any

from helena_cli import config
from helena_cli.runtime import Runtime
from helena_cli.settings import Settings

log = logging.getLogger(__name__)


class BatchEngine:
    """The engine of one process, built from the settings that apply here; a context manager.

    Operations are durable when a call returns and written within the interval, by this process or
    by whichever process of this host flushes. Nothing here waits for the database but `flush`.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self._runtime = Runtime(settings or config.load())

    def __enter__(self) -> "BatchEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add_operation(self, kind: str, table: str, data: Mapping[str, Any]) -> int:
        """Accept one operation and return its id.

        `kind` is "insert", "update" or "message"; `table` is a table's name or schema.name; `data`
        maps columns to values. Raises InvalidOperation, SpoolFull or SpoolUnavailable; then nothing
        was queued.
        """
        return self._runtime.engine.add_operation(kind, table, data)

    def add_operations(self, operations: Iterable[tuple[str, str, Mapping[str, Any]]]) -> list[int]:
        """Accept many (kind, table, data) at once, all or none, and return their ids in order."""
        return self._runtime.engine.add_operations(operations)

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all that is queued now is committed, dead, held or in a waiting lane.

        Returns False when that took longer than `timeout` seconds; nothing is lost then.
        """
        return self._runtime.engine.flush(timeout)

    def close(self) -> int:
        """Drain within the shutdown timeout; return how many operations remain in the spool."""
        self._runtime.close()
        if self._runtime.remaining:
            log.warning(
                "%d operations wait in %s; the next process that uses Helena, or `helena"
                " process-pending`, writes them",
                self._runtime.remaining,
                self._runtime.state_dir,
            )
        return self._runtime.remaining


_default: BatchEngine | None = None
_default_lock = threading.Lock()


def default_engine() -> BatchEngine:
    """The engine behind the module-level functions: made on first use, drained at exit."""
    global _default
    with _default_lock:
        if _default is None:
            _default = BatchEngine()
            atexit.register(_default.close)
        return _default


def add_operation(kind: str, table: str, data: Mapping[str, Any]) -> int:
    """Accept one operation with this process's engine: see `BatchEngine.add_operation`."""
    return default_engine().add_operation(kind, table, data)


def add_operations(operations: Iterable[tuple[str, str, Mapping[str, Any]]]) -> list[int]:
    """Accept many operations with this process's engine: see `BatchEngine.add_operations`."""
    return default_engine().add_operations(operations)


def flush(timeout: float | None = None) -> bool:
    """Wait until all that is queued now is settled: see `BatchEngine.flush`."""
    return default_engine().flush(timeout)
