"""Processes of this machine: found by what they run, and ended with everything they started.

A process is a `psutil.Process`: pid and time of creation, which psutil compares before it sends a
signal, so that a pid that was given to another process meanwhile is never hit.
"""

import logging
import os
import time
from collections.abc import Iterable, Sequence
from enum import StrEnum

import psutil
from msgspec import Struct

from helena_cli.host.argv import program

log = logging.getLogger(__name__)

#: Seconds between two looks at processes that are to end.
POLL = 0.05

#: Seconds after KILL in which a process must be gone; one that waits for a disk may take longer.
KILL_WAIT = 5.0


class Running(Struct, frozen=True):
    """A process that runs one of the names that were looked for."""

    process: psutil.Process
    name: str
    argv: tuple[str, ...]
    uid: int
    user: str

    @property
    def pid(self) -> int:
        return self.process.pid


def find(names: Sequence[str]) -> list[Running]:
    """All processes that run a script or module of one of these names, whoever owns them.

    What has ended already, and what this machine does not let us see, is left out.
    """
    found = []
    for process in psutil.process_iter():
        argv = command_line(process)
        name = program(argv).is_called(names)
        if name is None or is_helena(argv):
            continue
        try:
            uid, user = process.uids().real, process.username()
        except (psutil.Error, KeyError):
            continue
        found.append(Running(process, name, argv, uid, user))
    return found


def command_line(process: psutil.Process) -> tuple[str, ...]:
    """The words of its command line; none when it has ended, or may not be looked at."""
    try:
        return () if ended(process) else tuple(process.cmdline())
    except psutil.Error:
        return ()


def is_helena(argv: Sequence[str]) -> bool:
    """Whether this is Helena herself."""
    run = program(argv)
    module, base = run.module.partition(".")[0], run.script.rpartition("/")[2]
    return module == "helena_cli" or base == "helena"


def ended(process: psutil.Process) -> bool:
    """Whether it does nothing any more: gone, its pid given to another, or a zombie."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def ancestors(process: psutil.Process) -> list[psutil.Process]:
    """Its parent first."""
    try:
        return process.parents()
    except psutil.Error:
        return []


def own_line() -> set[int]:
    """The pids of this process and of everything that started it: never to be ended."""
    own = psutil.Process()
    return {own.pid, *(parent.pid for parent in own.parents())}


def tree(process: psutil.Process) -> list[psutil.Process]:
    """The process and everything that it started, parents first; Helena herself left out."""
    try:
        children = process.children(recursive=True)
    except psutil.Error:
        children = []
    spared = own_line()
    return [
        process,
        *(
            child
            for child in children
            if child.pid not in spared and not is_helena(command_line(child))
        ),
    ]


def may_signal(uid: int) -> bool:
    """Whether this user may end the processes of that one."""
    return os.geteuid() in (0, uid)


def is_launcher(process: psutil.Process) -> bool:
    """Whether it is a script or a loop of a shell, which may start something again and again.

    Not the shell in which a person sits, and no service such as sshd, or a web server in Python.
    """
    run = program(command_line(process))
    try:
        in_use = process.terminal() is not None and os.getsid(process.pid) == process.pid
    except (psutil.Error, OSError):
        return False
    typed_into = run.interpreter == "shell" and not run.script and not run.text
    base = run.script.rpartition("/")[2]
    known = base in LAUNCHERS or (run.interpreter != "" and base not in SUPERVISORS)
    return known and process.pid != 1 and not (in_use and typed_into) and not _serves(process)


def _serves(process: psutil.Process) -> bool:
    """Whether others can connect to it: then it is there for more than to start something."""
    try:
        return any(one.status == psutil.CONN_LISTEN for one in process.net_connections())
    except psutil.Error:
        return False


#: Programs that do nothing but run another one.
LAUNCHERS = frozenset(
    {"uv", "poetry", "pipenv", "pdm", "hatch", "rye", "pixi", "sudo", "doas", "timeout", "flock"}
    | {"watch", "entr", "nodemon", "watchexec", "xvfb-run", "env", "nice", "chronic", "time"}
)

#: Programs in an interpreted language that carry many others, each with its own way to stop them.
SUPERVISORS = frozenset({"supervisord", "circusd", "pm2", "honcho"})


class Ending(StrEnum):
    """How a process ended."""

    ENDED = "ended"
    KILLED = "killed"
    ALIVE = "alive"
    FORBIDDEN = "not permitted"


def end(processes: Iterable[psutil.Process], *, grace: float) -> dict[int, Ending]:
    """Ask these to end, wait `grace` seconds, kill what still runs; how each ended, by pid."""
    waiting = {process.pid: process for process in processes if not ended(process)}
    endings = {pid: Ending.ENDED for pid in waiting}
    for process in waiting.values():
        if not _send(process, "terminate"):
            endings[process.pid] = Ending.FORBIDDEN
        else:
            # A process that was halted sees its signal when it goes on.
            _send(process, "resume")
    alive = _wait([p for p in waiting.values() if endings[p.pid] is Ending.ENDED], grace)
    # What they have started since: their children die with them.
    doomed = {one.pid: one for parent in alive for one in tree(parent)}
    for process in doomed.values():
        endings[process.pid] = Ending.KILLED if _send(process, "kill") else Ending.FORBIDDEN
    for process in _wait(
        [p for p in doomed.values() if endings[p.pid] is Ending.KILLED], KILL_WAIT
    ):
        endings[process.pid] = Ending.ALIVE
    return endings


def _wait(processes: Sequence[psutil.Process], limit: float) -> list[psutil.Process]:
    """Wait until all have ended; those that have not."""
    deadline = time.monotonic() + limit
    while alive := [process for process in processes if not ended(process)]:
        if time.monotonic() >= deadline:
            break
        time.sleep(POLL)
    return alive


def _send(process: psutil.Process, signal: str) -> bool:
    """Send a signal; false when that is forbidden. Who has ended needs none."""
    try:
        getattr(process, signal)()
        log.debug("pid %d: %s", process.pid, signal)
    except psutil.NoSuchProcess:
        pass
    except psutil.AccessDenied:
        return False
    return True
