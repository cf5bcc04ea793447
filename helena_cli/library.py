"""The library: what `from helena_cli import …` gives to scripts and services."""

import atexit
import logging
import os
import sys
import threading
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from helena_cli import config
from helena_cli.batch import records
from helena_cli.batch.records import AgentContext, DocumentReference, DocumentUsage, Message
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
        self._closed = False

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

    def add_document_reference(self, data: DocumentReference) -> int:
        """Accept a reference to a document, and return the operation's id.

        The row with its `es_doc_id` holds these values afterwards; the defaults of what is left
        out too. To change single columns of a row there is an "update" by `add_operation`. Raises
        InvalidOperation, SpoolFull or SpoolUnavailable; then nothing was queued.
        """
        return self.add_operation(*records.document_reference(data, datetime.now(UTC)))

    def add_message(self, data: Message) -> int:
        """Accept a message, and return the operation's id; one whose `id` exists is left alone.

        Raises InvalidOperation, SpoolFull or SpoolUnavailable; then nothing was queued.
        """
        return self.add_operation(*records.message(data, datetime.now(UTC)))

    def add_agent_context(self, data: AgentContext) -> int:
        """Accept what an agent is to remember, and return the operation's id.

        It takes the place of what was under this agent, project and key. Raises InvalidOperation,
        SpoolFull or SpoolUnavailable; then nothing was queued.
        """
        return self.add_operation(*records.agent_context(data, datetime.now(UTC)))

    def log_document_usage(self, data: DocumentUsage) -> int:
        """Accept a note that a document was read, and return the operation's id.

        It waits at least a minute for a document that is not there yet. Raises InvalidOperation,
        SpoolFull or SpoolUnavailable; then nothing was queued.
        """
        return self.add_operation(*records.document_usage(data, datetime.now(UTC)))

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all that is queued now is committed, dead, held or in a waiting lane.

        Returns False when that took longer than `timeout` seconds; nothing is lost then.
        """
        return self._runtime.engine.flush(timeout)

    def close(self) -> int:
        """Drain within the shutdown timeout; return how many operations remain in the spool.

        Another process that flushes will write those. A second call does nothing.
        """
        if self._closed:
            return self._runtime.remaining
        self._closed = True
        self._runtime.close()
        if self._runtime.remaining and not self._runtime.left_to_another:
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
            _drain_child(_default)
        return _default


def _drain_child(engine: BatchEngine) -> None:
    """A child of multiprocessing runs no `atexit`, but what is registered here."""
    multiprocessing = sys.modules.get("multiprocessing.process")
    if multiprocessing is not None and multiprocessing.parent_process() is not None:
        from multiprocessing.util import Finalize

        Finalize(None, engine.close, exitpriority=-100)


def _drain_at_exit() -> None:
    if _default is not None:
        _default.close()


def _forget_in_child() -> None:
    """A forked child makes an engine of its own, when it needs one."""
    global _default, _default_lock
    _default, _default_lock = None, threading.Lock()


# At import, so that it comes after the exit handlers of the script, which may add operations too.
atexit.register(_drain_at_exit)
os.register_at_fork(after_in_child=_forget_in_child)


def add_operation(kind: str, table: str, data: Mapping[str, Any]) -> int:
    """Accept one operation with this process's engine: see `BatchEngine.add_operation`."""
    return default_engine().add_operation(kind, table, data)


def add_operations(operations: Iterable[tuple[str, str, Mapping[str, Any]]]) -> list[int]:
    """Accept many operations with this process's engine: see `BatchEngine.add_operations`."""
    return default_engine().add_operations(operations)


def add_document_reference(data: DocumentReference) -> int:
    """Accept a reference to a document: see `BatchEngine.add_document_reference`."""
    return default_engine().add_document_reference(data)


def add_message(data: Message) -> int:
    """Accept a message: see `BatchEngine.add_message`."""
    return default_engine().add_message(data)


def add_agent_context(data: AgentContext) -> int:
    """Accept what an agent is to remember: see `BatchEngine.add_agent_context`."""
    return default_engine().add_agent_context(data)


def log_document_usage(data: DocumentUsage) -> int:
    """Accept a note that a document was read: see `BatchEngine.log_document_usage`."""
    return default_engine().log_document_usage(data)


def flush(timeout: float | None = None) -> bool:
    """Wait until all that is queued now is settled: see `BatchEngine.flush`."""
    return default_engine().flush(timeout)
