"""Pending files, taken in again and again while `helena watch` runs.

On a thread of its own: another command may be at the same folders for a while.
"""

import logging
import os
import platform
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from helena_cli.cli import render
from helena_cli.errors import HelenaError
from helena_cli.settings import Settings

if TYPE_CHECKING:
    from helena_cli.documents.json_files import PendingReport
    from helena_cli.runtime import Runtime

log = logging.getLogger(__name__)

#: How long the end waits for files that are being taken in, seconds.
PATIENCE = 5.0


class Intake:
    """Takes in operation files, task files and the SQL backlog while the block runs.

    `settings` gives the settings as they are now; they may change.
    """

    def __init__(self, runtime: "Runtime", settings: Callable[[], Settings]) -> None:
        self._runtime = runtime
        self._settings = settings
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="helena-intake", daemon=True)
        self._said: dict[str, str] = {}

    def __enter__(self) -> "Intake":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(PATIENCE)

    def _run(self) -> None:
        while not self._stop.is_set():
            settings = self._settings()
            for name, work in (
                ("operations", self._operations),
                ("tasks", self._tasks),
                ("backlog", self._backlog),
            ):
                self._guarded(name, work, settings)
            self._stop.wait(settings.watch.rescan)

    def _guarded(self, name: str, work: Callable[[Settings], None], settings: Settings) -> None:
        try:
            work(settings)
        except HelenaError as error:
            text = f"{error} {error.remedy}"
            if self._said.get(name) != text:
                log.warning("Pending %s: %s", name, text)
            self._said[name] = text
        except Exception:
            # The next time may go well, and the folders are watched meanwhile.
            log.exception("Pending %s could not be taken in.", name)
        else:
            self._said.pop(name, None)

    def _operations(self, settings: Settings) -> None:
        from helena_cli.documents.pending import drain_operation_files

        folder = Path(settings.pending.operations)
        if _has_files(folder, ".json"):
            spool, limit = self._runtime.spool, settings.batch.max_operation_bytes
            _tell("operation file", drain_operation_files(folder, spool, max_bytes=limit))

    def _tasks(self, settings: Settings) -> None:
        from helena_cli.database.registry import DocumentRegistry
        from helena_cli.documents.reconcile import reconcile
        from helena_cli.documents.tasks import QUEUES, Tasks

        folder = Path(settings.pending.tasks)
        if not any(_has_files(folder / name, ".json") for name in QUEUES):
            return
        base = settings.config_file.parent if settings.config_file else Path()
        limit, host = settings.batch.max_operation_bytes, platform.node()
        with (
            self._runtime.connection("watch") as connection,
            Tasks(folder, base=base, max_bytes=limit) as tasks,
        ):
            registry = DocumentRegistry(connection)
            places = [Path(root) for root in settings.documents.roots]
            documents = tasks.select(settings.documents, registry.roots(host), places)
            report = None
            if tasks.documents:
                report = reconcile(
                    tasks.documents,
                    settings=documents,
                    host=host,
                    registry=registry,
                    queue=self._runtime.spool,
                )
            _tell("task file", tasks.settle(report))

    def _backlog(self, settings: Settings) -> None:
        from helena_cli.database.backlog import drain_backlog

        folder = Path(settings.pending.backlog)
        if not _has_files(folder, ".sql"):
            return
        with self._runtime.connection("watch") as connection:
            report = drain_backlog(
                folder,
                connection,
                tables=settings.pending.tables,
                max_bytes=settings.batch.max_bytes,
            )
        if report.applied:
            log.info("%s applied.", render.many(report.applied, "file of the SQL backlog"))
        _warn((failure.path, failure.reason) for failure in report.failures)


def _has_files(folder: Path, suffix: str) -> bool:
    """Whether there is anything to do; what a killed process left counts."""
    for place in (folder, folder / "processing"):
        with suppress(OSError), os.scandir(place) as entries:
            if any(entry.name.endswith(suffix) for entry in entries):
                return True
    return False


def _tell(what: str, report: "PendingReport") -> None:
    if report.accepted:
        log.info("%s taken in.", render.many(report.accepted, what))
    _warn((failure.path, failure.reason) for failure in report.failures)


def _warn(failures: Iterable[tuple[str, str]]) -> None:
    for path, reason in failures:
        log.warning("%s: %s", path, reason)
