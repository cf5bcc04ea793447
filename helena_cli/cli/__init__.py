"""The command line: which commands there are, and the one place where errors end.

A command file reads options, makes one call into the library, shows the result and returns an exit
code. It imports what it needs inside the command, so that `helena --help` stays quick.

stdout carries the result, stderr everything that is said about it. After an error stdout is empty,
with `--json` too, unless the command could answer in part.
"""

import errno
import io
import logging
import os
import sys
from collections.abc import Iterator, Sequence

import typer

from helena_cli.cli import (
    clear_locks,
    dead_letters,
    enqueue,
    init,
    options,
    process_pending,
    render,
    service,
    status,
    stop_realtime,
    test,
    watch,
)
from helena_cli.errors import ExitCode, HelenaError

log = logging.getLogger(__name__)

app = typer.Typer(
    help="A durable local queue and one polite batch writer for PostgreSQL.",
    epilog="Exit codes: 0 done; 1 in part, or unhealthy; 2 wrong usage; 3 configuration; "
    "4 database unreachable; 5 refused; 70 a bug; 130 interrupted.",
    # Plain help: boxes and colours would cost more than all the rest of a start.
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
app.command("test", short_help="Prove that this set-up works, and what it gains.")(test.command)
app.command("process-pending", short_help="Index documents, write what is queued.")(
    process_pending.command
)
app.command("watch", short_help="Follow folders, write what is queued, until Ctrl-C.")(
    watch.command
)
app.command("stop-realtime", short_help="Stop the old real-time writers, or bring them back.")(
    stop_realtime.command
)
app.command("clear-locks", short_help="Free a stuck database.")(clear_locks.command)
app.command("status", short_help="Show queue, flushes, database and a checklist.")(status.command)
app.add_typer(
    dead_letters.app,
    name="dead-letters",
    short_help="List, show, retry or drop refused operations.",
)
app.command("enqueue", short_help="Queue operations read as JSON lines from stdin.")(
    enqueue.command
)
app.command("init", short_help="Create or upgrade the tables.")(init.command)
app.add_typer(
    service.app,
    name="service",
    short_help="Install, remove or show the background service.",
)


@app.callback()
def _program(version: options.Version = False) -> None:
    """Without a command there is only the help and the version."""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Nothing escapes; a bug becomes 70."""
    _prepare_streams()
    try:
        code = _invoke(arguments)
        print(end="", flush=True)
    except OSError as error:
        # A reader that has gone away knows it, and is told nothing.
        if not isinstance(error, BrokenPipeError):
            _say(f"the result could not be written: {error.strerror}.")
        # Python flushes stdout once more when it exits, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.PARTIAL
    return code


def _invoke(arguments: Sequence[str] | None) -> int:
    try:
        app(arguments, prog_name="helena")
    except SystemExit as end:
        if end.code == ExitCode.INTERRUPTED:
            _say("interrupted; what was queued stays in the queue.")
        return end.code if isinstance(end.code, int) else ExitCode.DONE
    except HelenaError as error:
        log.debug("The error came from here.", exc_info=True)
        report(error)
        return error.exit_code
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and not error.filename:
            raise  # stdout: everywhere else a full disk is one of Helena's errors
        # Not of the family: a bug, and it must look like one.
        log.debug("The bug is here.", exc_info=True)
        _say(f"this is a bug in Helena: {type(error).__name__}: {error}")
        _say("run the command again with -v for the traceback, and report it.")
        return ExitCode.BUG
    return ExitCode.DONE


def report(error: HelenaError) -> None:
    """What happened, why, and what to do, in plain lines on stderr."""
    _say(str(error))
    for cause in _causes(error):
        # Without number and path, which the message has in words.
        text = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
        # The driver's errors go on with the statement and a mark below it.
        reason = text.strip().partition("\n")[0]
        if reason and reason not in str(error):
            render.say(f"  because: {reason}")
    render.say(f"  what to do: {error.remedy}")


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause = error.__cause__
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _say(text: str) -> None:
    render.say(f"helena: {text}")


class _StderrHandler(logging.Handler):
    """Writes to whatever stderr is now: a progress bar puts its own in place."""

    def emit(self, record: logging.LogRecord) -> None:
        # With -v for whoever looks for a cause, else for whoever just wants the result.
        verbose = options.PACKAGE_LOG.isEnabledFor(logging.DEBUG)
        render.say(self.format(record) if verbose else f"helena: {record.getMessage()}")


def _prepare_streams() -> None:
    # A file name need not be Unicode; it is shown escaped instead of ending the command.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    options.PACKAGE_LOG.handlers[:] = [handler]
    options.PACKAGE_LOG.setLevel(logging.WARNING)
