"""The machine's service manager, and what Helena asks of it."""

import os
import shlex
import sys
from typing import Protocol

from helena_cli.errors import ConfigurationError
from helena_cli.host.job import Job
from helena_cli.host.launchd import Launchd
from helena_cli.host.service_file import ServiceFile
from helena_cli.host.service_state import ServiceState
from helena_cli.host.systemd import Systemd

PLATFORM = sys.platform

#: Exists while systemd is the init of this machine, as sd_booted(3) has it.
BOOTED = "/run/systemd/system"


class ServiceManager(Protocol):
    """The background service under one service manager. All but `text` raise HelenaError."""

    manager: str
    name: str
    #: Commands for the person: to read the service's log, to start it anew.
    logs: str
    restart: str
    file: ServiceFile

    def text(self, job: Job) -> bytes:
        """The service's file for this job."""
        ...

    def refusal(self) -> str | None:
        """Why the manager cannot be asked; None when it answers."""
        ...

    def state(self) -> ServiceState:
        """The service as the manager sees it."""
        ...

    def install(self, job: Job) -> list[str]:
        """Have the service as this job says, running; what was done for that, in words."""
        ...

    def uninstall(self) -> list[str]:
        """Stop the service and forget it; what was done for that, in words."""
        ...

    def hint(self) -> str | None:
        """What else this user may want to do."""
        ...


def usual() -> ServiceManager:
    """The manager that this kind of machine has, whether it answers or not."""
    return Launchd() if PLATFORM == "darwin" else Systemd()


def answering(job: Job | None = None) -> ServiceManager:
    """The manager, after it has answered. Raises ConfigurationError without one.

    The remedy names another way to run this job.
    """
    manager = usual()
    reason = manager.refusal()
    if reason is None:
        return manager
    if manager.manager == "systemd" and os.path.isdir(BOOTED):
        raise ConfigurationError(
            f"This user's systemd does not answer: {reason}.",
            remedy="Log in as this user directly (by ssh, or machinectl shell USER@), not by su or "
            f"sudo. Or: loginctl enable-linger; export XDG_RUNTIME_DIR=/run/user/{os.getuid()}",
        )
    line = cron_line(job) if job else "@reboot helena watch PATH"
    raise ConfigurationError(
        f"Neither systemd nor launchd manages services here: {reason}.",
        remedy="Let something else start helena watch, such as supervisord, runit or a container; "
        f"or cron, with this line in crontab -e: {line}",
    )


def cron_line(job: Job) -> str:
    """A line for a crontab that starts the job at boot."""
    variables = " ".join(f"{name}={shlex.quote(text)}" for name, text in job.variables.items())
    line = f"cd {shlex.quote(job.folder)}; {variables} exec {shlex.join(job.command)}"
    # To cron a % is the end of the line.
    return f"@reboot {line}".replace("%", "\\%")
