"""`helena watch`: follow folders, and write what is queued, until told to end."""

import logging
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from helena_cli.cli import options, render
from helena_cli.cli.options import Common, with_common_options
from helena_cli.errors import ExitCode, HelenaError, UsageError

if TYPE_CHECKING:
    from helena_cli.cli.checks import Check
    from helena_cli.database.registry import DocumentRegistry
    from helena_cli.host.signals import Signals
    from helena_cli.runtime import Runtime
    from helena_cli.settings import Settings

log = logging.getLogger(__name__)

#: Seconds between two looks at how the parts are; a signal is answered at once.
TICK = 5.0

#: How long another command may keep the host's third connection before it is tried later, seconds.
WAIT = 1.0

#: A statement of the watcher ends after so many seconds: it must not hang with the database.
STATEMENT = 30.0

#: At the end, the share of the shutdown timeout that looking at documents may take.
SHARE = 0.5

#: What a reload cannot change.
FIXED = ("database", "batch", "spool", "metrics")


class LogFormat(StrEnum):
    """How flushes and the log are written where nobody looks at a terminal."""

    TEXT = "text"
    JSON = "json"


@with_common_options
def command(
    common: Common,
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATH", help="Folders of documents; else [documents] roots."),
    ] = None,
    log_format: Annotated[
        LogFormat | None,
        typer.Option("--log-format", help="Say each flush and the log as text or as JSON lines."),
    ] = None,
) -> ExitCode:
    """Follow folders: index what is saved in them, and write what is queued, until Ctrl-C.

    It shows a live view on a terminal, else a line for each flush; with --json, or a --log-format,
    never the view. Pending files are taken in at the start and at each rescan. SIGHUP reads the
    configuration again. SIGTERM and Ctrl-C write what is queued; a second one ends at once.
    """
    from helena_cli.host.signals import Signals
    from helena_cli.runtime import Runtime

    if common.json:
        log_format = LogFormat.JSON
    with Signals() as signals, Runtime(common.settings()) as runtime:
        watch = _Watch(runtime, signals, common, [*(paths or ())])
        return watch.run(log_format)


class _Watch:
    """The parts of one run, and how they work together."""

    def __init__(
        self, runtime: "Runtime", signals: "Signals", common: Common, paths: Sequence[str]
    ) -> None:
        from helena_cli.documents.watch import Watcher
        from helena_cli.documents.watch_lock import WatchLocks
        from helena_cli.host.notify import Notifier

        self._runtime = runtime
        self._signals = signals
        self._common = common
        self._paths = paths
        self._settings = runtime.settings
        places = self._places(self._settings)
        self._locks = WatchLocks(runtime.spool.path)
        self._locks.take(places)
        self._notifier = Notifier()
        self._watcher = Watcher(
            places,
            self._settings,
            host=platform.node(),
            queue=runtime.spool,
            connect=self._connect,
        )

    def run(self, log_format: LogFormat | None) -> ExitCode:
        """Watch until a signal comes, then drain."""
        from helena_cli.cli.intake import Intake

        with ExitStack() as stack:
            stack.callback(self._locks.release)
            stack.enter_context(self._view(log_format))
            self._watcher.start()
            # Should anything fail from here on, no event goes astray; a second stop does nothing.
            stack.callback(self._watcher.stop, 0.0)
            self._runtime.engine.start()
            stack.enter_context(self._metrics())
            with Intake(self._runtime, lambda: self._settings):
                self._notifier.ready()
                self._follow()
                self._notifier.stopping()
            return self._end()

    def _follow(self) -> None:
        """Until a signal asks for the end."""
        pause = min(TICK, self._notifier.watchdog_interval or TICK)
        told = None
        while not self._signals.stopping:
            if self._signals.take_reload():
                self._notifier.reloading()
                self._reload()
                self._notifier.ready()
            self._locks.keep(self._watcher.places)
            if self._watcher.alive():
                self._notifier.alive()
            else:
                log.error("The watcher gives no sign of life.")
            status = self._status()
            if status != told:
                told = status
                self._notifier.status(status)
            self._signals.wait(pause)

    def _end(self) -> ExitCode:
        """Look at what has not settled, write what is queued, and say what remains."""
        limit = self._settings.batch.shutdown_timeout
        deadline = time.monotonic() + limit
        log.info("Stopping.")
        self._watcher.stop(limit * SHARE)
        engine = self._runtime.engine
        remaining = engine.close(max(1.0, deadline - time.monotonic()))
        unfinished = self._watcher.unfinished
        if unfinished:
            log.warning("Not all was looked at, the next start does it: %s", unfinished)
        if remaining and engine.left_to_another:
            operations = render.many(remaining, "operation")
            log.warning("Another process of this host writes what is queued: %s.", operations)
            remaining = 0
        elif remaining:
            log.warning(
                "Still queued: %s, in %s. The next helena watch or helena process-pending, or any"
                " program that uses Helena, writes them.",
                render.many(remaining, "operation"),
                self._runtime.spool.path,
            )
        return ExitCode.PARTIAL if remaining or unfinished else ExitCode.DONE

    def _places(self, settings: "Settings") -> list[Path]:
        """The folders to watch, without links. Raises UsageError."""
        named = self._paths or settings.documents.roots
        if not named:
            raise UsageError(
                "There is nothing to watch.",
                remedy="Give a folder: helena watch PATH, or set [documents] roots.",
            )
        for path in self._paths:
            if not path.strip() or not os.path.isdir(path):
                raise UsageError(
                    f"There is no folder {path!r}.",
                    remedy="Give folders that exist; what is in [documents] roots may come later.",
                )
        return [Path(os.path.realpath(os.path.expanduser(path))) for path in named]

    def _reload(self) -> None:
        """Read the configuration again; a bad one is reported, and the old one stays."""
        try:
            settings = self._common.settings()
            places = self._places(settings)
            self._locks.take(places)
        except HelenaError as error:
            log.error("The old configuration stays in use. %s %s", error, error.remedy)
            return
        fixed = [one for one in FIXED if getattr(settings, one) != getattr(self._settings, one)]
        if fixed:
            log.warning("Changes of [%s] count from the next start on.", "], [".join(fixed))
        self._settings = settings
        self._watcher.reconfigure(places, settings)
        log.info("The configuration was read again.")

    @contextmanager
    def _connect(self) -> "Iterator[DocumentRegistry]":
        from helena_cli.database import schema
        from helena_cli.database.registry import bounded

        with self._runtime.connection("watch", wait=WAIT) as connection:
            # Before anything is queued: is this database prepared at all?
            schema.target_id(connection)
            with bounded(connection, seconds=STATEMENT) as registry:
                yield registry

    def _view(self, log_format: LogFormat | None) -> "AbstractContextManager[object]":
        from helena_cli.cli.flush_log import FlushLog
        from helena_cli.cli.live import LiveView

        if log_format is None and sys.stdout is not None and LiveView.possible():
            return LiveView(self._runtime, self._watcher.state, self._checks)
        if not options.PACKAGE_LOG.isEnabledFor(logging.INFO):
            # Nobody sees a picture: the log tells when it starts, stops and reads its settings.
            options.PACKAGE_LOG.setLevel(logging.INFO)
        return FlushLog(self._runtime.spool, as_json=log_format is LogFormat.JSON)

    def _checks(self) -> "Sequence[Check]":
        from helena_cli.cli.observer import Observer

        # Not kept open: this process has its connections already.
        with self._runtime.turn(WAIT), Observer(self._runtime) as observer:
            return observer.checks()

    @contextmanager
    def _metrics(self) -> Iterator[None]:
        from helena_cli.host.metrics import MetricsServer

        settings = self._settings.metrics
        server = MetricsServer(
            self._runtime.spool,
            host=settings.host,
            port=settings.port,
            flusher_running=self._runtime.flusher_running,
            health=self._health,
        )
        try:
            if settings.enabled:
                server.start()
        except HelenaError as error:
            log.warning("%s Helena goes on without. %s", error, error.remedy)
        try:
            yield
        finally:
            server.stop()

    def _health(self) -> str | None:
        """Why not all is well, None when it is. Anybody may read it."""
        if not self._watcher.alive():
            return "the watcher gives no sign of life"
        if self._runtime.engine.failure is not None:
            return "the database cannot be written to"
        if not self._runtime.flusher_running():
            return "no process writes what is queued"
        if all(root.mode == "away" for root in self._watcher.state().roots):
            return "no folder can be watched"
        return None

    def _status(self) -> str:
        """One line for whoever asks the service manager."""
        state = self._watcher.state()
        away = sum(root.mode == "away" for root in state.roots)
        watched = render.many(len(state.roots) - away, "folder")
        parts = [f"{watched} watched"]
        parts += [f"{away:,} away"] if away else []
        parts += [self._health() or "", state.failure or ""]
        return "; ".join(part for part in parts if part)
