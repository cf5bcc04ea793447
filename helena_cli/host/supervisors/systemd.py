"""systemd: its services, and the timers, sockets and paths that start them."""

import os
import pwd
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from helena_cli.host.argv import programs
from helena_cli.host.commands import TIMED_OUT, Finished, run
from helena_cli.host.masking import masked_command
from helena_cli.host.processes import Running
from helena_cli.host.supervisors import Job, Wanted, carries, refused

#: Seconds for a question; a unit that is stopped may take longer than its own patience.
ASK = 10.0

#: Where the folders of users' managers are.
RUNTIME = Path("/run/user")

_ASKED = (
    "Id,MainPID,ExecStart,LoadState,ActiveState,UnitFileState,FragmentPath,TriggeredBy,Triggers"
)
_TRIGGERS = ("*.timer", "*.path", "*.socket")
_RUNS = frozenset({"active", "activating", "reloading", "deactivating"})

#: Where units of the person who runs this machine lie: a mask has no effect beside them, for it is
#: a file of the same name in the same place, or in one that counts less.
_OWN_PLACES = ("/etc/systemd/", "/.config/systemd/")

Properties = Mapping[str, str]


class Unit(Struct, frozen=True):
    """Where a process belongs, as its control group says."""

    name: str
    #: The user whose manager it is; None is the system's own.
    user: int | None


def unit_of(cgroup: str) -> Unit | None:
    """The service in the text of /proc/PID/cgroup; None in a session or outside of systemd."""
    for line in cgroup.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "name=systemd"):
            continue
        manager = re.search(r"/user@(\d+)\.service(?=/)", path)
        below = path[manager.end() :] if manager else path
        services = re.findall(r"(?<=/)[^/]+\.service(?=/|$)", below)
        if services:
            return Unit(services[0], int(manager[1]) if manager else None)
    return None


class Systemd:
    """The units of the system's manager and of users' managers."""

    def jobs(self, wanted: Wanted, found: Sequence[Running]) -> list[Job]:
        """Services that run what was found or is wanted, with what triggers them."""
        units = {running.pid: _unit(running.pid) for running in found}
        users = {os.geteuid(), *(unit.user for unit in units.values() if unit and unit.user)}
        return [
            job
            for user in (None, *sorted(users))
            if user is None or os.geteuid() in (0, user)
            for job in _Manager(user).jobs(wanted, found, units)
        ]

    def hold(self, job: Job, grace: float) -> None:
        """Stop the unit, and let nothing start it. Raises HelenaError."""
        _Manager(_user(job.place)).hold(job, grace)

    def release(self, job: Job) -> None:
        """Enable and start it, if it was so. Raises HelenaError."""
        _Manager(_user(job.place)).release(job)


def _unit(pid: int) -> Unit | None:
    try:
        return unit_of(Path(f"/proc/{pid}/cgroup").read_text())
    except OSError:
        return None


def _user(place: str) -> int | None:
    return int(place) if place else None


class _Manager:
    """One manager: the system's, or a user's."""

    def __init__(self, user: int | None) -> None:
        self._user = user
        self._systemctl = ["systemctl", "--no-ask-password"]
        if user is not None:
            self._systemctl += ["--user"]
            if user != os.geteuid():
                self._systemctl += [f"--machine={_name(user)}@.host"]
            elif (RUNTIME / str(user) / "systemd/private").exists() and not self._answers():
                # After `sudo -u` or `su` nothing names the folder where the manager listens.
                self._systemctl = [
                    "env",
                    f"XDG_RUNTIME_DIR={RUNTIME / str(user)}",
                    *self._systemctl,
                ]

    def _answers(self) -> bool:
        return run([*self._systemctl, "show", "--property=Version"], timeout=ASK).code == 0

    def jobs(
        self, wanted: Wanted, found: Sequence[Running], units: Mapping[int, Unit | None]
    ) -> list[Job]:
        services = []
        for unit in self._show("*.service"):
            main = int(unit.get("MainPID", "0"))
            own = Unit(unit["Id"], self._user)
            inside = [one for one in found if units[one.pid] == own or one.pid == main]
            if self._meant(unit, wanted, inside):
                services.append((unit, tuple(one.pid for one in inside)))
        names = {name for unit, _ in services for name in unit.get("TriggeredBy", "").split()}
        triggers = self._show(*_TRIGGERS) if names else []
        jobs = [self._job(unit, ()) for unit in triggers if unit["Id"] in names]
        jobs += [self._job(unit, pids) for unit, pids in services]
        # What is neither running nor would start by itself is no danger.
        return [job for job in jobs if job.facts["active"] or job.facts["enabled"]]

    def _show(self, *patterns: str) -> list[Properties]:
        ask = [*self._systemctl, "show", "--all", f"--property={_ASKED}", *patterns]
        answer = run(ask, timeout=ASK)
        blocks = answer.output.split("\n\n") if answer.code == 0 else []
        units = (dict(_properties(block)) for block in blocks)
        return [unit for unit in units if unit.get("Id") and unit.get("LoadState") != "masked"]

    def _meant(self, unit: Properties, wanted: Wanted, inside: Sequence[Running]) -> bool:
        name = unit["Id"]
        if name in wanted.services or name.removesuffix(".service") in wanted.services:
            return True
        if any(wanted.runs(programs(argv)) for argv in _commands(unit)):
            return True
        main = int(unit.get("MainPID", "0"))
        return main != 0 and any(carries(main, one, inside) for one in inside)

    def _job(self, unit: Properties, pids: tuple[int, ...]) -> Job:
        name, path = unit["Id"], unit.get("FragmentPath", "")
        enabled = unit.get("UnitFileState", "").startswith("enabled")
        active = unit.get("ActiveState") in _RUNS
        mask = not any(place in path for place in _OWN_PLACES)
        commands = [masked_command(argv) for argv in _commands(unit)]
        by_hand = [
            *(["unmask"] if mask else []),
            *(["enable"] if enabled else []),
            *(["start"] if active else []),
        ]
        prefix = "systemctl" if self._user is None else "systemctl --user"
        return Job(
            supervisor=prefix.replace("systemctl", "systemd"),
            name=name,
            command="; ".join(commands) or f"starts {unit.get('Triggers', 'a unit')}",
            undo=" && ".join(f"{prefix} {verb} {name}" for verb in by_hand),
            pids=pids,
            place="" if self._user is None else str(self._user),
            facts={
                "active": active,
                "enabled": enabled,
                "mask": mask,
                "path": os.path.realpath(path) if path else "",
            },
        )

    def hold(self, job: Job, grace: float) -> None:
        # Before it is stopped, or a unit that triggers it could start it in between.
        if job.facts["enabled"]:
            self._do("disable", job)
        if job.facts["mask"]:
            self._do("mask", job)
        answer = run([*self._systemctl, "stop", job.name], timeout=grace)
        if answer.code == TIMED_OUT:
            # The manager goes on stopping it, with a patience of minutes.
            run([*self._systemctl, "kill", "--signal=KILL", job.name], timeout=ASK)
            answer = run([*self._systemctl, "stop", job.name], timeout=ASK)
        self._check(answer, "stop", job)

    def release(self, job: Job) -> None:
        if job.facts["mask"]:
            self._do("unmask", job)
        if job.facts["enabled"]:
            answer = run([*self._systemctl, "enable", job.name], timeout=ASK)
            if answer.code and job.facts["path"]:
                # A unit that was linked from elsewhere lost its link.
                answer = run([*self._systemctl, "enable", str(job.facts["path"])], timeout=ASK)
            self._check(answer, "enable", job)
        if job.facts["active"]:
            self._do("start", job)

    def _do(self, verb: str, job: Job) -> None:
        self._check(run([*self._systemctl, verb, job.name], timeout=6 * ASK), verb, job)

    def _check(self, answer: Finished, verb: str, job: Job) -> None:
        if answer.code:
            typed = " ".join(one for one in self._systemctl if one != "--no-ask-password")
            raise refused(
                f"{typed} {verb} {job.name} failed",
                answer.error or answer.output,
                remedy=f"Units of the system need root: sudo {typed} {verb} {job.name}"
                if self._user is None
                else f"See: {typed} status {job.name}",
            )


def _name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)


def _properties(block: str) -> Iterator[tuple[str, str]]:
    for line in block.splitlines():
        name, equals, value = line.partition("=")
        # A service may have several commands, each on a line of the same name.
        if equals:
            yield (f"{name} {value}" if name == "ExecStart" else name), value


def _commands(unit: Properties) -> list[list[str]]:
    """What a service runs; systemctl shows it without the quotes it was written with."""
    found = [
        re.search(r"argv\[\]=(.*?) ; ", value)
        for name, value in unit.items()
        if name.startswith("ExecStart")
    ]
    return [match[1].split() for match in found if match]
