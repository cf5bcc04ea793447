"""A real systemd as the first process of namespaces of its own: its units are those of a test.

It shares the disk with this machine, but for /run and /etc/systemd/system, and sees none of its
processes.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.hosts import wait_until

PROGRAM = Path("/lib/systemd/systemd")
UNITS = Path("/etc/systemd/system")
#: As good as that of packages: what an administrator writes counts more.
VENDOR_UNITS = Path("/run/systemd/system")

#: The arguments are the folder of the units, and that of the vendor's.
BOOT = f"""
mount --make-rprivate / && mount -t tmpfs none /run && mount -t proc proc /proc || exit 1
mkdir -p {VENDOR_UNITS} && mount --bind "$1" {UNITS} && mount --bind "$2" {VENDOR_UNITS} || exit 1
umount -R /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup || exit 1
container=test exec {PROGRAM} --system --unit=test.target --log-target=console
"""
TARGET = "[Unit]\nDefaultDependencies=no\n"


def obstacle() -> str | None:
    """Why there can be no such systemd here; None when there can."""
    if os.geteuid() != 0:
        return "only root may make the namespaces in which systemd runs"
    if not PROGRAM.exists() or not shutil.which("unshare") or not shutil.which("nsenter"):
        return "systemd, unshare or nsenter is not installed"
    return None


class SystemSystemd:
    """A system of its own. Started; its units go into `units` and `vendor_units`."""

    def __init__(self, folder: Path) -> None:
        self.units, self.vendor_units = folder / "units", folder / "vendor"
        for path in (self.units, self.vendor_units):
            path.mkdir()
        (self.units / "test.target").write_text(TARGET)
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    *("unshare", "--pid", "--mount", "--cgroup", "--uts", "--ipc", "--fork"),
                    *("--kill-child", "sh", "-c", BOOT, "sh", self.units, self.vendor_units),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def answers(self) -> bool:
        """Whether it came up. What it said otherwise is in `log`."""
        wait_until(
            lambda: (
                self._process.poll() is not None
                or (self._first() and not self.run(["systemctl", "is-active", "test.target"]))
            ),
            "systemd comes up, or ends",
        )
        return self._process.poll() is None

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def service(self, name: str, argv: Sequence[object], *, vendor: bool = False) -> None:
        """Write a service that is always restarted."""
        folder = self.vendor_units if vendor else self.units
        (folder / name).write_text(
            f"{TARGET}[Service]\nExecStart={' '.join(map(str, argv))}\n"
            "Restart=always\nRestartSec=100ms\n[Install]\nWantedBy=test.target\n"
        )

    def enter(self, argv: Sequence[object]) -> list[str]:
        """The command that runs this one inside."""
        namespaces = ("-t", str(self._first()), "-m", "-p", "-C", "-i", "-u")
        return ["nsenter", *namespaces, *map(str, argv)]

    def run(self, argv: Sequence[object]) -> int:
        """Run a command inside: its exit code."""
        return self._run(argv).returncode

    def output(self, *argv: object) -> str:
        return self._run(argv).stdout.strip()

    def _run(self, argv: Sequence[object]) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(self.enter(argv), capture_output=True, text=True, timeout=60)

    def _first(self) -> int | None:
        """The pid of systemd, as it is seen from outside."""
        try:
            children = psutil.Process(self._process.pid).children()
        except psutil.NoSuchProcess:
            return None
        return children[0].pid if children and children[0].name() == "systemd" else None

    def close(self) -> None:
        """End it, and with it everything inside."""
        first = self._first()
        if first is not None:
            psutil.Process(first).kill()
        self._process.kill()
        self._process.wait()
