"""Supervisors: programs that start others again when these end, or at a certain time."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import psutil
from msgspec import Struct

from helena_cli.errors import HelenaError
from helena_cli.host.argv import Program, run_by
from helena_cli.host.processes import Running, ancestors, is_launcher, tree


class Wanted(Struct, frozen=True):
    """What is looked for: names of scripts and modules, and names of jobs."""

    processes: tuple[str, ...]
    services: tuple[str, ...] = ()

    def runs(self, programs: Sequence[Program]) -> bool:
        """Whether one of the programs has one of the names."""
        return run_by(programs, self.processes) is not None


class Job(Struct, frozen=True):
    """Something that a supervisor runs, or would start; all that is needed to undo holding it."""

    supervisor: str
    name: str
    #: What it runs, fit to be shown.
    command: str
    #: How to undo by hand what holding it does.
    undo: str
    #: The processes that it runs now, of those that were found.
    pids: tuple[int, ...] = ()
    #: Which manager, domain, configuration or table it belongs to.
    place: str = ""
    #: What the supervisor that made it has to remember.
    facts: Mapping[str, str | bool] = {}

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What makes it the same job in another look."""
        return self.supervisor, self.place, self.name, self.command


class Supervisor(Protocol):
    """One kind of supervisor on this machine, present or not."""

    def jobs(self, wanted: Wanted, found: Sequence[Running]) -> list[Job]:
        """The jobs that run what was found, or would start what is wanted. Never raises."""
        ...

    def hold(self, job: Job, grace: float) -> None:
        """Stop it and keep it from being started. Raises HelenaError."""
        ...

    def release(self, job: Job) -> None:
        """Bring it back as it was. Raises HelenaError."""
        ...


def refused(what: str, answer: str, *, remedy: str) -> HelenaError:
    """The error of a supervisor's program that did not do what was asked."""
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    reason = f": {lines[-1].removesuffix('.')}" if lines else ""
    return HelenaError(f"{what}{reason}.", remedy=remedy)


def carries(main_pid: int, running: Running, found: Sequence[Running]) -> bool:
    """Whether a job's main process is there for this one alone.

    It is this process, or leads to it through scripts and wrappers only and started nothing else
    but what was found. cron and sshd carry many things: they must not be stopped for one of them.
    """
    if main_pid == running.pid:
        return True
    line = [running.process, *ancestors(running.process)]
    position = next((n for n, one in enumerate(line) if one.pid == main_pid), None)
    if position is None or not all(is_launcher(one) for one in line[1 : position + 1]):
        return False
    return not strangers(line[position], found)


def strangers(parent: psutil.Process, found: Sequence[Running]) -> bool:
    """Whether it also started what was not looked for, directly or not."""
    known = {one.pid for running in found for one in tree(running.process)}
    lines = {one.pid for running in found for one in ancestors(running.process)}
    return any(one.pid not in known | lines for one in tree(parent)[1:])
