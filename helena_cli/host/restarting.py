"""Processes that are started again as they were: folder, variables, user, and where they wrote."""

import os
import subprocess
from collections.abc import Collection
from typing import IO

import psutil

from helena_cli.errors import HelenaError
from helena_cli.host.masking import masked_command
from helena_cli.host.processes import command_line, may_signal
from helena_cli.host.stop_record import StoppedProcess

#: A process that ends with an error within this time, seconds, did not start.
SETTLED = 1.0


def remembered(process: psutil.Process) -> StoppedProcess | None:
    """All that it takes to start it again; None when it has ended, or may not be looked into."""
    try:
        with process.oneshot():
            seen = process.as_dict(["cmdline", "cwd", "environ", "uids", "gids"])
        groups = _groups(process)
    except psutil.Error:
        return None
    argv = tuple(seen["cmdline"] or ())
    if not argv or seen["cwd"] is None or seen["environ"] is None:
        return None
    return StoppedProcess(
        pid=process.pid,
        argv=argv,
        command=masked_command(argv),
        folder=seen["cwd"],
        variables=seen["environ"],
        uid=seen["uids"].real,
        gid=seen["gids"].real,
        groups=groups,
        output=_file(process.pid, 1),
        errors=_file(process.pid, 2),
    )


def _groups(process: psutil.Process) -> tuple[int, ...]:
    """Its further groups, where the platform tells."""
    try:
        with open(f"/proc/{process.pid}/status", encoding="utf-8") as status:
            line = next(line for line in status if line.startswith("Groups:"))
        return tuple(map(int, line.split()[1:]))
    except (OSError, StopIteration):
        return ()


def _file(pid: int, stream: int) -> str:
    """The file that a stream goes into; empty for a terminal, a pipe, or what is gone."""
    try:
        path = os.readlink(f"/proc/{pid}/fd/{stream}")
    except OSError:
        return ""
    return path if os.path.isfile(path) else ""


def start_again(stopped: StoppedProcess, taken: Collection[int] = ()) -> int:
    """Start it; its pid, or that of one which runs already, if not `taken`. Raises HelenaError."""
    running = _running(stopped, taken)
    if running is not None:
        return running
    if not may_signal(stopped.uid):
        raise HelenaError(
            f"{stopped.command} belonged to another user.",
            remedy="Run the same command as that user, or as root.",
        )
    try:
        with _opened(stopped.output) as output, _opened(stopped.errors) as errors:
            process = _spawn(stopped, output, errors)
    except OSError as error:
        # Its program, its folder, or a file that it wrote to.
        what = f"{error.filename}: " if error.filename else ""
        raise HelenaError(
            f"{stopped.command} cannot be started: {what}{error.strerror}.",
            remedy=f"Start it by hand, in {stopped.folder}.",
        ) from error
    try:
        code = process.wait(SETTLED)
    except subprocess.TimeoutExpired:
        # It goes on after us: nobody will wait for it.
        process.returncode = 0
        return process.pid
    if code:
        raise HelenaError(
            f"{stopped.command} ended at once, with code {code}.",
            remedy=f"Start it by hand, in {stopped.folder}, and see what it says.",
        )
    return process.pid


def _spawn(
    stopped: StoppedProcess, output: IO[bytes], errors: IO[bytes]
) -> "subprocess.Popen[bytes]":
    other = stopped.uid != os.geteuid()
    return subprocess.Popen(
        stopped.argv,
        cwd=stopped.folder,
        env=stopped.variables,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=errors,
        start_new_session=True,
        user=stopped.uid if other else None,
        group=stopped.gid if other else None,
        extra_groups=list(stopped.groups) if other else None,
    )


def _opened(path: str) -> IO[bytes]:
    # Without "a" it would begin its log anew.
    return open(path or os.devnull, "ab")


def _running(stopped: StoppedProcess, taken: Collection[int]) -> int | None:
    """The pid of a process that does the same already."""
    for process in psutil.process_iter():
        if process.pid in taken:
            continue
        try:
            same = command_line(process) == stopped.argv and process.uids().real == stopped.uid
            if same and process.cwd() == stopped.folder:
                return process.pid
        except psutil.Error:
            continue
    return None
