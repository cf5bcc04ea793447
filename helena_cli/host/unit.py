"""The unit file of the background service for systemd's user manager (pure)."""

import shutil
from math import ceil

from helena_cli.host.job import Job
from helena_cli.host.service_file import MARK

NAME = "helena_batch_processor.service"

#: Nothing of this needs a privilege that a user's manager may lack, or a namespace, which many
#: machines refuse: then the service would not start. A private /tmp would hide watched folders.
#: Only seccomp and resource settings are left, and these hold for the embedded server too.
HARDENING = (
    "NoNewPrivileges=yes",
    "RestrictSUIDSGID=yes",
    "RestrictRealtime=yes",
    "RestrictNamespaces=yes",
    # Netlink: getaddrinfo asks it which addresses this machine has.
    "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK",
    "LockPersonality=yes",
    "SystemCallArchitectures=native",
    "UMask=0077",
)


def text(job: Job) -> str:
    """The file. Every name in it is read back by systemd as it is here."""
    return "\n".join(
        (
            f"# {MARK}, which writes it anew. For settings of your own:",
            f"# systemctl --user edit {NAME}",
            "[Unit]",
            "Description=Helena, batch writer for PostgreSQL",
            # An hour of failing starts is no accident: then somebody has to look.
            "StartLimitIntervalSec=1h",
            "StartLimitBurst=60",
            "",
            "[Service]",
            "Type=notify",
            "NotifyAccess=main",
            # The colon: no variables are replaced in what follows.
            f"ExecStart=:{' '.join(map(quoted, job.command))}",
            f"ExecReload={shutil.which('kill') or '/bin/kill'} -HUP $MAINPID",
            # Without the folder it still starts.
            f"WorkingDirectory=-{_specifiers(job.folder)}",
            *(
                f"Environment={quoted(f'{name}={value}')}"
                for name, value in sorted(job.variables.items())
            ),
            "# Optional, for what must not stand here: HELENA_DSN=... (chmod 600)",
            f"EnvironmentFile=-{_specifiers(job.secrets)}",
            "# The embedded server may have to recover from a crash first.",
            "TimeoutStartSec=5min",
            f"TimeoutStopSec={ceil(job.stop_seconds)}",
            "WatchdogSec=2min",
            "Restart=on-failure",
            "RestartSec=10",
            "# A wrong configuration does not mend itself.",
            "RestartPreventExitStatus=3",
            "# The embedded server is a child, and others may use it: the last of them stops it.",
            "KillMode=process",
            "OOMPolicy=continue",
            *HARDENING,
            "",
            "[Install]",
            "WantedBy=default.target",
            "",
        )
    )


def quoted(word: str) -> str:
    """A word of a command line or an assignment, as systemd unquotes it."""
    return f'"{"".join(map(_escaped, _specifiers(word)))}"'


def _specifiers(word: str) -> str:
    return word.replace("%", "%%")


def _escaped(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    if character.isprintable():
        return character
    # Also what is no text at all: the file itself has to be UTF-8.
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))
