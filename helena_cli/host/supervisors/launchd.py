"""launchd: agents and daemons of macOS, by their property lists and `launchctl list`."""

import os
import plistlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.parsers.expat import ExpatError

from helena_cli.host.argv import programs
from helena_cli.host.commands import Finished, run
from helena_cli.host.masking import masked_command
from helena_cli.host.processes import Running
from helena_cli.host.supervisors import Job, Wanted, carries, refused

#: launchd answers with this while the last job of the label is still being removed.
BUSY = 5
IN_PROGRESS = 36

#: How often, and seconds apart, it is tried again meanwhile.
ATTEMPTS = 20
PAUSE = 0.5


class Launchd:
    """The jobs of the user's own domain, and of the system's for root."""

    def __init__(self, folders: Sequence[Path] | None = None) -> None:
        agents = [Path.home() / "Library/LaunchAgents", Path("/Library/LaunchAgents")]
        daemons = [Path("/Library/LaunchDaemons")]
        self._folders = folders or (daemons if os.geteuid() == 0 else [*agents, *daemons])

    def jobs(self, wanted: Wanted, found: Sequence[Running]) -> list[Job]:
        """Loaded jobs that run what was found or is wanted, and those that would be loaded."""
        answer = run(["launchctl", "list"])
        if answer.code:
            return []
        loaded = dict(_listed(answer.output))
        jobs = []
        for path, plist in self._plists():
            label, argv = str(plist.get("Label", "")), _arguments(plist)
            pid = loaded.get(label, 0)
            pids = tuple(one.pid for one in found if pid and carries(pid, one, found))
            if label in wanted.services or pids or wanted.runs(programs(argv)):
                jobs.append(_job(label, path, argv, pids, loaded=label in loaded))
        return [job for job in jobs if job.facts["loaded"] or not job.facts["disabled"]]

    def hold(self, job: Job, grace: float) -> None:
        """Remove it from its domain, and keep it from being loaded. Raises HelenaError."""
        target = f"{job.place}/{job.name}"
        if not job.facts["disabled"]:
            _check(run(["launchctl", "disable", target]), "disable", target)
        if job.facts["loaded"]:
            answer = run(["launchctl", "bootout", target], timeout=grace + 10)
            if answer.code not in (0, IN_PROGRESS):
                _check(answer, "bootout", target)
            # It answers before everything has ended.
            for _ in range(ATTEMPTS):
                if run(["launchctl", "print", target]).code:
                    return
                time.sleep(PAUSE)
            raise refused(f"{target} does not end", "", remedy=f"See: launchctl print {target}")

    def release(self, job: Job) -> None:
        """Allow it again, and load it if it was loaded. Raises HelenaError."""
        target = f"{job.place}/{job.name}"
        if not job.facts["disabled"]:
            _check(run(["launchctl", "enable", target]), "enable", target)
        if job.facts["loaded"] and run(["launchctl", "print", target]).code:
            command = ["launchctl", "bootstrap", job.place, str(job.facts["path"])]
            answer = run(command)
            for _ in range(ATTEMPTS):
                if answer.code not in (BUSY, IN_PROGRESS):
                    break
                time.sleep(PAUSE)
                answer = run(command)
            _check(answer, "bootstrap", f"{job.place} {job.facts['path']}")

    def _plists(self) -> Iterator[tuple[Path, Mapping[str, Any]]]:
        for folder in self._folders:
            for path in sorted(folder.glob("*.plist")):
                try:
                    plist = plistlib.loads(path.read_bytes())
                except (OSError, ValueError, ExpatError):
                    continue
                if isinstance(plist, dict):
                    yield path, plist


def _listed(output: str) -> Iterator[tuple[str, int]]:
    """Label and pid, 0 without one, of each job that is loaded."""
    for line in output.splitlines():
        pid, _, label = line.partition("\t")
        label = label.rpartition("\t")[2]
        if label and label != "Label":
            yield label, int(pid) if pid.isdigit() else 0


def _arguments(plist: Mapping[str, Any]) -> list[str]:
    arguments = plist.get("ProgramArguments") or [plist.get("Program", "")]
    return [str(word) for word in arguments] if isinstance(arguments, list) else []


def _job(label: str, path: Path, argv: list[str], pids: tuple[int, ...], *, loaded: bool) -> Job:
    domain = _domain(label, path, loaded=loaded)
    disabled = _disabled(label, domain)
    target = f"{domain}/{label}"
    by_hand = [
        *([] if disabled else [f"launchctl enable {target}"]),
        *([f"launchctl bootstrap {domain} {path}"] if loaded else []),
    ]
    return Job(
        supervisor="launchd",
        name=label,
        command=masked_command(argv),
        undo=" && ".join(by_hand),
        pids=pids,
        place=domain,
        facts={"loaded": loaded, "disabled": disabled, "path": str(path)},
    )


def _domain(label: str, path: Path, *, loaded: bool) -> str:
    if "LaunchDaemons" in path.parts:
        return "system"
    # Over ssh there may be no graphical session to hold the agents.
    gui, user = f"gui/{os.geteuid()}", f"user/{os.geteuid()}"
    return user if loaded and run(["launchctl", "print", f"{gui}/{label}"]).code else gui


def _disabled(label: str, domain: str) -> bool:
    answer = run(["launchctl", "print-disabled", domain])
    state = re.search(rf'"{re.escape(label)}" => (\w+)', answer.output)
    return state is not None and state[1] in ("true", "disabled")


def _check(answer: Finished, verb: str, target: str) -> None:
    if answer.code:
        raise refused(
            f"launchctl {verb} {target} failed",
            answer.error or answer.output,
            remedy=f"Daemons of the system need root: sudo launchctl {verb} {target}",
        )
