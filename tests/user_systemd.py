"""A real user manager of systemd, for tests: `systemd --user` with folders and cgroups of its own.

It believes that the machine was booted with systemd, which it looks up in a folder that only its
own mount namespace has. It does not touch the manager of whoever runs the tests.
"""

import contextlib
import functools
import os
import secrets
import shutil
import signal
import subprocess
from pathlib import Path

from tests.hosts import wait_until

PROGRAM = Path("/lib/systemd/systemd")

#: Enters the cgroups, then a mount namespace in which systemd finds what it looks for.
START = """
for group in "$@"; do echo $$ > "$group/cgroup.procs"; done
exec unshare --mount --propagation private sh -c '
    mkdir -p /run/systemd && mount -t tmpfs none /run/systemd && mkdir /run/systemd/system &&
    exec "$0" --user' "$PROGRAM"
"""


def obstacle() -> str | None:
    """Why there can be no manager here; None when there can."""
    if os.geteuid() != 0:
        return "only root may give systemd cgroups and a mount namespace"
    if not PROGRAM.exists() or not shutil.which("systemctl") or not shutil.which("unshare"):
        return "systemd is not installed"
    if not _cgroups():
        return "there are no cgroups that can be written"
    return None


class UserSystemd:
    """The manager of `home`, with its sockets in `runtime`, which has to be short. Started."""

    def __init__(self, home: Path, runtime: Path) -> None:
        name = f"helena-test-{secrets.token_hex(4)}"
        self._groups = [group / name for group in _cgroups()]
        self.variables = {"HOME": str(home), "XDG_RUNTIME_DIR": str(runtime)}
        self._log = runtime / "log"
        for group in self._groups:
            group.mkdir()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["sh", "-c", START, "sh", *map(str, self._groups)],
                env={
                    **self.variables,
                    "PATH": os.environ["PATH"],
                    "PROGRAM": str(PROGRAM),
                    "SYSTEMD_LOG_TARGET": "console",
                },
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def answers(self) -> bool:
        """Whether it came up. What it said otherwise is in `log`."""
        wait_until(
            lambda: (
                self._process.poll() is not None
                or self.ask("show", "--property=Version").returncode == 0
            ),
            "the user's systemd comes up, or ends",
        )
        return self._process.poll() is None

    def ask(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """systemctl --user."""
        return subprocess.run(
            ["systemctl", "--user", "--no-pager", *arguments],
            env={**self.variables, "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def close(self) -> None:
        """End it, its services, and its cgroups."""
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for group in self._groups:
            wait_until(functools.partial(_removed, group), f"{group} is empty")


def _removed(group: Path) -> bool:
    """Whether the cgroup is gone. Ends what is left in it: that belongs to this test alone."""
    for folder in sorted([group, *group.rglob("*/")], reverse=True):
        # 0 is a process that this namespace cannot name, and to kill() all of our own group.
        pids = {*map(int, (folder / "cgroup.procs").read_text().split())} - {0}
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            folder.rmdir()
    return not group.exists()


def _cgroups() -> list[Path]:
    """Our own place in the hierarchies in which systemd keeps its services."""
    places = dict(
        line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines()
    )
    found = []
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind, options = line.split()[:4]
        name = "" if kind == "cgroup2" else "name=systemd"
        if kind == "cgroup2" or (kind == "cgroup" and name in options.split(",")):
            place = Path(mount + places.get(name, "/"))
            if os.access(place, os.W_OK):
                found.append(place)
    return found
