"""The background service as an agent of launchd."""

import math
import os
import plistlib
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.parsers.expat import ExpatError

from helena_cli.errors import ConfigurationError, HelenaError
from helena_cli.host.commands import Finished, run
from helena_cli.host.job import Job
from helena_cli.host.service_file import MARK, ServiceFile
from helena_cli.host.service_state import ServiceState, started_at

LABEL = "helena_batch_processor"

#: How long launchd may take to have stopped the agent: longer than any sensible ExitTimeOut.
STOP_LIMIT = 3600.0

#: What bootout says when the agent has not ended yet.
IN_PROGRESS = 36

#: An agent starts when launchd was told so, but not at once. Seconds.
START_LIMIT = 10.0


class Launchd:
    """The agent `helena_batch_processor` of this user. All raise HelenaError."""

    manager = "launchd"
    name = LABEL

    def __init__(self) -> None:
        home = Path.home()
        self.file = ServiceFile(home / "Library" / "LaunchAgents" / f"{LABEL}.plist")
        self._log = home / "Library" / "Logs" / f"{LABEL}.log"
        self._domain = f"gui/{os.getuid()}"
        self._target = f"{self._domain}/{LABEL}"
        self.logs = f"tail -n 50 {self._log}"
        self.restart = f"launchctl kickstart -k {self._target}"

    def text(self, job: Job) -> bytes:
        """The property list for this job. Raises ConfigurationError for a name it cannot hold."""
        agent = {
            "Label": LABEL,
            "ProgramArguments": list(job.command),
            "EnvironmentVariables": dict(job.variables),
            "WorkingDirectory": job.folder,
            "RunAtLoad": True,
            # As Restart=on-failure.
            "KeepAlive": {"SuccessfulExit": False},
            "ThrottleInterval": 10,
            "ExitTimeOut": math.ceil(job.stop_seconds),
            "ProcessType": "Background",
            "Umask": 0o077,
            # A line for each flush, which nobody would ever rotate; what matters is on stderr.
            "StandardOutPath": os.devnull,
            "StandardErrorPath": str(self._log),
        }
        return _plist(agent)

    def refusal(self) -> str | None:
        """Why launchd cannot be asked; None when it answers."""
        answer = run(("launchctl", "print", self._domain))
        return None if answer.code == 0 else _complaint(answer)

    def state(self) -> ServiceState:
        """The agent as launchd sees it."""
        answer = run(("launchctl", "print", self._target))
        facts = dict(re.findall(r"^\t([a-z ]+) = (.*)$", answer.output, flags=re.MULTILINE))
        loaded = answer.code == 0
        pid = int(facts["pid"]) if facts.get("pid", "").isdecimal() else None
        code = re.match(r"\d+", facts.get("last exit code", ""))
        ended_by = re.search(r"\d+$", facts.get("last terminating signal", ""))
        ended = -int(ended_by[0]) if ended_by else int(code[0]) if code else None
        return ServiceState(
            installed=self.file.path.exists(),
            enabled=self.file.path.exists() and not self._disabled(),
            active=pid is not None,
            state=facts.get("state", "loaded") if loaded else "not loaded",
            pid=pid,
            since=started_at(pid),
            restarts=max(0, int(facts["runs"]) - 1) if "runs" in facts else None,
            exit_code=ended if pid is None else None,
        )

    def install(self, job: Job) -> list[str]:
        """Have the agent as this job says, now and at every login.

        Returns what was done for that, in words; nothing when it was so already.
        """
        text, found, before = self.text(job), self.file.read(), self.state()
        if found == text and before.enabled and before.active:
            return []
        done = self.file.update(text, found)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._unload()
        # What was disabled once stays so, even when its file is written anew.
        _require("enable", self._target)
        _require("bootstrap", self._domain, str(self.file.path))
        _await(lambda: self.state().active, START_LIMIT)
        now = self.state()
        if not now.active:
            raise HelenaError(
                f"{LABEL} is installed, but does not run: launchd says {now.state!r}, exit code "
                f"{now.exit_code}.",
                remedy=f"See why: {self.logs}; mend it, then: {self.restart}",
            )
        done.append("restarted it" if before.active else "started it")
        return done

    def uninstall(self) -> list[str]:
        """Stop the agent and forget it. Returns what was done for that, in words."""
        found = self.file.read()
        done = []
        if self._unload():
            done.append("stopped it")
        if found is not None:
            self.file.remove()
            done.append(f"removed {self.file.path}")
        return done

    def hint(self) -> str | None:
        """What else this user may want to do."""
        return None

    def _disabled(self) -> bool:
        listed = run(("launchctl", "print-disabled", self._domain)).output
        return bool(re.search(rf'"{LABEL}" => (disabled|true)', listed))

    def _unload(self) -> bool:
        """Have launchd stop and forget the agent; whether it knew it."""
        if not self._loaded():
            return False
        # It may answer that this goes on; then it is not over yet.
        answer = run(("launchctl", "bootout", self._target), timeout=STOP_LIMIT)
        _await(
            lambda: not self._loaded(), STOP_LIMIT if answer.code == IN_PROGRESS else START_LIMIT
        )
        if self._loaded():
            raise _failure("bootout", answer)
        return True

    def _loaded(self) -> bool:
        return run(("launchctl", "print", self._target)).code == 0


def _plist(agent: Mapping[str, Any]) -> bytes:
    try:
        text = plistlib.dumps(agent, sort_keys=False)
        if plistlib.loads(text) == agent:
            mark = f"<!-- {MARK}, which writes it anew. -->\n<plist "
            return text.replace(b"<plist ", mark.encode(), 1)
    except (ValueError, ExpatError):
        pass
    raise ConfigurationError(
        "A path or a variable has a character that a property list cannot hold.",
        remedy="Watch a folder whose path has no control characters and is UTF-8.",
    )


def _require(*arguments: str) -> None:
    answer = run(("launchctl", *arguments), timeout=30.0)
    if answer.code:
        raise _failure(arguments[0], answer)


def _failure(command: str, answer: Finished) -> HelenaError:
    return HelenaError(
        f"launchctl {command} failed: {_complaint(answer)}",
        remedy="Run the same command again; the reason may stand in: log show --last 5m "
        "--predicate 'process == \"launchd\"'",
    )


def _complaint(answer: Finished) -> str:
    return " ".join(answer.error.split()) or f"exit code {answer.code}"


def _await(condition: Callable[[], bool], limit: float) -> None:
    """Wait until it is so, or the time is over."""
    deadline = time.monotonic() + limit
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.2)
