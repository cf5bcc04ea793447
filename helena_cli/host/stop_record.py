"""The record of what `helena stop-realtime` has stopped: `--undo` brings back what stands in it.

Each thing is recorded before it is stopped, so that a run that is cut off can be undone too. The
file is private to the user: it holds the variables that a process needs to start again.
"""

import json
import os
from pathlib import Path

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from helena_cli.errors import HelenaError, SpoolUnavailable
from helena_cli.host.supervisors import Job


class StoppedProcess(Struct, frozen=True, tag="process"):
    """A process, with all that it takes to start it again as it was."""

    pid: int
    argv: tuple[str, ...]
    #: The same, fit to be shown.
    command: str
    folder: str
    variables: dict[str, str]
    uid: int
    gid: int
    groups: tuple[int, ...]
    #: The files that its stdout and stderr went into; empty when they were none.
    output: str
    errors: str


class HeldJob(Struct, frozen=True, tag="job"):
    """A supervisor's job that was stopped and is kept from starting."""

    job: Job


Entry = StoppedProcess | HeldJob


class Record:
    """The file in the state directory; each change is on the disk when a method returns."""

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / "stop-realtime.json"

    def entries(self) -> list[Entry]:
        """What was stopped, in that order. Raises HelenaError when the file is damaged."""
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
            return msgspec.convert(document["entries"], list[Entry])
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise HelenaError(
                f"The record of what was stopped cannot be read: {self.path}.",
                remedy="Look into it: it names each job and command. Move it away to start anew.",
            ) from error

    def add(self, entry: Entry) -> None:
        """Note something that is about to be stopped. Raises SpoolUnavailable."""
        entries = self.entries()
        if entry not in entries:
            self._write([*entries, entry])

    def knows(self, process: StoppedProcess) -> bool:
        """Whether the same is there under any pid."""
        return any(
            isinstance(entry, StoppedProcess) and replace(entry, pid=process.pid) == process
            for entry in self.entries()
        )

    def remove(self, entry: Entry) -> None:
        """Forget something that runs again, or was not stopped after all."""
        self._write([other for other in self.entries() if other != entry])

    def _write(self, entries: list[Entry]) -> None:
        # The standard library keeps what is no valid Unicode in a command line or a crontab.
        text = json.dumps({"version": 1, "entries": msgspec.to_builtins(entries)}, indent=1)
        fresh = self.path.with_suffix(".new")
        try:
            if not entries:
                self.path.unlink(missing_ok=True)
                return
            with open(fresh, "w", encoding="utf-8", opener=_private) as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, self.path)
        except OSError as error:
            raise SpoolUnavailable(
                f"What is to be stopped cannot be recorded in {self.path}: {error.strerror}.",
                remedy="Free some space there, or set HELENA_STATE_DIR to another disk.",
            ) from error


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
