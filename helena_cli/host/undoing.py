"""Bringing back what `helena stop-realtime` has stopped."""

import logging
from collections.abc import Sequence

from msgspec import Struct

from helena_cli.errors import HelenaError
from helena_cli.host.restarting import start_again
from helena_cli.host.stop_plan import supervisors
from helena_cli.host.stop_record import Entry, HeldJob, Record

log = logging.getLogger(__name__)


class Restored(Struct, frozen=True):
    """Something that runs again; `pid` of a process that was started here."""

    command: str
    supervisor: str | None
    job: str | None
    pid: int | None = None


class NotRestored(Struct, frozen=True):
    """Something that could not be brought back; it stays in the record."""

    command: str
    reason: str
    remedy: str


def undo(record: Record, entries: Sequence[Entry]) -> tuple[list[Restored], list[NotRestored]]:
    """Bring these back, the last one first; what is back is forgotten."""
    known = supervisors()
    restored, failures = [], []
    # The same may have run twice, side by side.
    started: set[int] = set()
    for entry in reversed(entries):
        try:
            if isinstance(entry, HeldJob):
                job = entry.job
                known[job.supervisor].release(job)
                back = Restored(job.command, job.supervisor, job.name)
            else:
                pid = start_again(entry, started)
                started.add(pid)
                back = Restored(entry.command, None, None, pid)
        except HelenaError as error:
            command = entry.job.command if isinstance(entry, HeldJob) else entry.command
            failures.append(NotRestored(command, str(error), error.remedy))
            continue
        record.remove(entry)
        restored.append(back)
        log.info("back: %s", back.command)
    return restored, failures
