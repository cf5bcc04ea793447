"""The background service under systemd's user manager."""

import os
import textwrap
from collections.abc import Mapping
from pathlib import Path

import platformdirs

from helena_cli.errors import HelenaError
from helena_cli.host import unit
from helena_cli.host.commands import Finished, run
from helena_cli.host.job import Job
from helena_cli.host.service_file import ServiceFile
from helena_cli.host.service_state import ServiceState, started_at

#: systemd itself ends a start after TimeoutStartSec, and a stop after TimeoutStopSec, which grows
#: with `shutdown_timeout`. These are for a systemd that does not. Seconds.
START_LIMIT = 600.0
STOP_LIMIT = 3600.0

_ASKED = (
    *("UnitFileState", "ActiveState", "SubState", "MainPID", "NRestarts", "StatusText"),
    *("ExecMainExitTimestampMonotonic", "ExecMainCode", "ExecMainStatus"),
)


class Systemd:
    """The unit `helena_batch_processor.service` of this user. All raise HelenaError."""

    manager = "systemd"
    name = unit.NAME
    logs = f"journalctl --user -u {unit.NAME} -n 50"
    restart = f"systemctl --user restart {unit.NAME}"

    def __init__(self) -> None:
        self.file = ServiceFile(platformdirs.user_config_path() / "systemd" / "user" / unit.NAME)

    @staticmethod
    def text(job: Job) -> bytes:
        """The unit file for this job."""
        return unit.text(job).encode()

    @staticmethod
    def refusal() -> str | None:
        """Why this user's manager cannot be asked; None when it answers."""
        answer = _systemctl("show", "--property=Version")
        return None if answer.code == 0 else _complaint(answer)

    def state(self) -> ServiceState:
        """The service as systemd sees it."""
        return _state(self._facts(), self.file.path)

    def install(self, job: Job) -> list[str]:
        """Have the service as this job says, now and at every login.

        Returns what was done for that, in words; nothing when it was so already.
        """
        text, found, before = self.text(job), self.file.read(), self.state()
        if found == text and before.enabled and before.active:
            return []
        done = self.file.update(text, found)
        _require("daemon-reload")
        if not before.enabled:
            _require("enable", unit.NAME)
            done.append("enabled it")
        # One that failed too often would refuse to start. Of others it knows nothing to reset.
        _systemctl("reset-failed", unit.NAME)
        answer = _systemctl("restart", unit.NAME, timeout=START_LIMIT)
        if answer.code:
            raise HelenaError(
                f"{unit.NAME} is installed, but does not start: {_complaint(answer)}"
                f"{_last_words()}",
                remedy=f"See all of it: {self.logs}; mend it, then: {self.restart}",
            )
        done.append("restarted it" if before.active else "started it")
        return done

    def uninstall(self) -> list[str]:
        """Stop the service and forget it. Returns what was done for that, in words."""
        found, facts = self.file.read(), self._facts()
        done = []
        if facts["ActiveState"] not in ("inactive", "failed"):
            _require("stop", unit.NAME, timeout=STOP_LIMIT)
            done.append("stopped it")
        if facts["UnitFileState"] == "enabled":
            _require("disable", unit.NAME)
            done.append("disabled it")
        if found is not None:
            self.file.remove()
            done.append(f"removed {self.file.path}")
            _require("daemon-reload")
        # systemd remembers a failed unit without a file, too.
        _systemctl("reset-failed", unit.NAME)
        return done

    def hint(self) -> str | None:
        """What else this user may want to do."""
        answer = run(("loginctl", "show-user", str(os.getuid()), "--property=Linger"))
        if answer.output.strip() == "Linger=yes":
            return None
        return (
            "It runs while you are logged in. To have it from boot on, and after you log out: "
            "loginctl enable-linger"
        )

    def _facts(self) -> Mapping[str, str]:
        shown = _require("show", unit.NAME, f"--property={','.join(_ASKED)}").output
        return dict(line.partition("=")[::2] for line in shown.splitlines())


def _state(facts: Mapping[str, str], file: Path) -> ServiceState:
    active, sub = facts["ActiveState"], facts["SubState"]
    pid = int(facts["MainPID"]) or None
    # Zero for a process that runs, or never ran.
    ended = pid is None and int(facts["ExecMainExitTimestampMonotonic"]) > 0
    code = int(facts["ExecMainStatus"])
    by_signal = int(facts["ExecMainCode"]) in (os.CLD_KILLED, os.CLD_DUMPED)
    return ServiceState(
        installed=file.exists(),
        enabled=facts["UnitFileState"] == "enabled",
        active=active in ("active", "reloading"),
        state=active if active == sub else f"{active} ({sub})",
        pid=pid,
        since=started_at(pid),
        restarts=int(facts["NRestarts"]),
        exit_code=(-code if by_signal else code) if ended else None,
        text=facts["StatusText"],
    )


def _systemctl(*arguments: str, timeout: float = 30.0) -> Finished:
    return run(("systemctl", "--user", "--no-pager", *arguments), timeout=timeout)


def _require(*arguments: str, timeout: float = 30.0) -> Finished:
    answer = _systemctl(*arguments, timeout=timeout)
    if answer.code:
        command = " ".join(("systemctl --user", *arguments))
        raise HelenaError(
            f"{command} failed: {_complaint(answer)}",
            remedy="See what systemd says: systemctl --user status "
            f"{unit.NAME}; then run the same command again.",
        )
    return answer


def _last_words() -> str:
    """What the service wrote last, where there is a journal."""
    asked = ("journalctl", "--user", "--no-pager", "-q", "-u", unit.NAME, "-n", "5", "-o", "cat")
    said = run(asked).output.strip()
    return f"\n{textwrap.indent(said, '  it said: ')}" if said else ""


def _complaint(answer: Finished) -> str:
    return " ".join(answer.error.split()) or f"exit code {answer.code}"
