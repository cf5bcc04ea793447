"""supervisord: the programs of each that runs here, by supervisorctl and its configuration."""

import configparser
import glob
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil
from msgspec import Struct

from helena_cli.errors import HelenaError
from helena_cli.host.argv import Program, program, programs
from helena_cli.host.commands import run
from helena_cli.host.marks import (
    MARK,
    bring_back,
    lines_of,
    put_out,
    read_file,
    replace_file,
)
from helena_cli.host.masking import masked
from helena_cli.host.processes import Running, command_line
from helena_cli.host.supervisors import Job, Wanted, carries, refused

#: Where supervisord looks when it is told nothing: from its own program, and from its folder.
_BESIDE = ("../etc/supervisord.conf", "../supervisord.conf")
_USUAL = (
    *("supervisord.conf", "etc/supervisord.conf"),
    *("/etc/supervisord.conf", "/etc/supervisor/supervisord.conf"),
)

#: States in which it runs, or is about to.
_RUNS = frozenset({"RUNNING", "STARTING", "BACKOFF", "STOPPING"})


class Instance(Struct, frozen=True):
    """A supervisord that runs: the program that talks to it, and its configuration."""

    supervisorctl: str
    config: Path

    def ask(self, *words: str, timeout: float = 10.0) -> str:
        """What supervisorctl says."""
        answer = run([self.supervisorctl, "-c", str(self.config), *words], timeout=timeout)
        return answer.output + answer.error

    def states(self) -> Mapping[str, tuple[str, int]]:
        """Each process's full name with its state and its pid, 0 without one."""
        lines = re.findall(r"^(\S+)\s+([A-Z]+)\b *(?:pid (\d+))?", self.ask("status"), flags=re.M)
        return {name: (state, int(pid or 0)) for name, state, pid in lines}

    def sections(self) -> Iterator[tuple[Path, str, Mapping[str, str]]]:
        """The file, name and options of each program in the configuration and what it includes."""
        for path in self._files():
            parser = configparser.RawConfigParser(
                strict=False, inline_comment_prefixes=(";", "#"), allow_no_value=True
            )
            try:
                parser.read_string(read_file(path))
            except (OSError, configparser.Error):
                continue
            for section in parser.sections():
                if section.startswith("program:"):
                    yield path, section.removeprefix("program:"), dict(parser[section])

    def _files(self) -> list[Path]:
        parser = configparser.RawConfigParser(strict=False, allow_no_value=True)
        try:
            parser.read_string(read_file(self.config))
        except (OSError, configparser.Error):
            return []
        included = parser.get("include", "files", fallback="") or ""
        here = included.replace("%(here)s", str(self.config.parent))
        found = [glob.glob(str(self.config.parent / pattern)) for pattern in here.split()]
        return [self.config, *(Path(path) for paths in found for path in sorted(paths))]


class Supervisord:
    """The programs of every supervisord that runs on this machine."""

    def jobs(self, wanted: Wanted, found: Sequence[Running]) -> list[Job]:
        """Programs that run what was found, or would start what is wanted."""
        return [job for instance in _instances() for job in _jobs(instance, wanted, found)]

    def hold(self, job: Job, grace: float) -> None:
        """Stop it, and do not start it with supervisord. Raises HelenaError."""
        instance = _instance(job)
        names = _names(instance, job.name)
        # The first may need its whole patience; supervisord kills it then.
        said = instance.ask("stop", *names, timeout=max(grace, 10.0) + 10.0) if names else ""
        states = instance.states()
        if not states or any(states[name][0] in _RUNS for name in names if name in states):
            raise refused(
                f"supervisorctl stop {' '.join(names)} failed",
                said,
                remedy=f"By hand: {instance.supervisorctl} -c {instance.config} stop {job.name}",
            )
        if job.facts["autostart"]:
            self._edit(job, _without_autostart)

    def release(self, job: Job) -> None:
        """Let it start with supervisord again, and start what ran. Raises HelenaError."""
        if job.facts["autostart"]:
            self._edit(job, _with_autostart)
        instance = _instance(job)
        names = str(job.facts["running"]).split()
        if not names:
            return
        said = instance.ask("start", *names, timeout=60)
        states = instance.states()
        if any(states.get(name, ("", 0))[0] not in _RUNS for name in names):
            raise refused(
                f"supervisorctl start {' '.join(names)} failed",
                said,
                remedy=f"See: {instance.supervisorctl} -c {instance.config} status",
            )

    def _edit(self, job: Job, change: Callable[[str, str], str]) -> None:
        path = Path(str(job.facts["file"]))
        try:
            text = read_file(path)
            changed = change(text, job.name)
            if changed != text:
                replace_file(path, changed)
        except OSError as error:
            raise HelenaError(
                f"{job.name} is stopped, but {path} cannot be written ({error.strerror}): "
                "supervisord would start it again when it starts itself.",
                remedy=f"Set autostart=false in [program:{job.name}] there, or run this with sudo.",
            ) from error


def _without_autostart(text: str, name: str) -> str:
    """The configuration with `autostart=false` in the section of this program."""
    mark, added = _mark(name)
    inside = False

    def old(line: str) -> bool:
        nonlocal inside
        if line.startswith("["):
            inside = _heads(line, name)
        return inside and re.match(r"autostart\s*[=:]", line) is not None

    lines = []
    for line in lines_of(put_out(text, old, mark=mark)):
        lines.append(line)
        if _heads(line, name):
            lines[-1] = line if line.endswith("\n") else f"{line}\n"
            lines.append(added)
    return "".join(lines)


def _with_autostart(text: str, name: str) -> str:
    """The configuration as it was before `_without_autostart`."""
    mark, added = _mark(name)
    kept = "".join(line for line in lines_of(text) if line != added)
    return bring_back(kept, lambda line: True, mark=mark)


def _mark(name: str) -> tuple[str, str]:
    return f"; {MARK} {name}: ", f"autostart=false ; {MARK} {name}\n"


def _heads(line: str, name: str) -> bool:
    return re.match(rf"\[program:{re.escape(name)}\]", line) is not None


def _instances() -> Iterator[Instance]:
    for process in psutil.process_iter():
        argv = command_line(process)
        run_as = program(argv)
        if run_as.is_called(["supervisord"]) is None:
            continue
        config = _config(process, run_as, argv)
        if config is not None:
            beside = Path(run_as.script).with_name("supervisorctl")
            yield Instance(str(beside) if beside.is_file() else "supervisorctl", config)


def _config(process: psutil.Process, run_as: Program, argv: Sequence[str]) -> Path | None:
    """The configuration that a supervisord was given, or finds where it looks."""
    try:
        folder = Path(process.cwd())
    except psutil.Error:
        folder = Path("/")
    given = [
        *(argv[n + 1] for n, word in enumerate(argv[:-1]) if word in ("-c", "--configuration")),
        *(word.partition("=")[2] for word in argv if word.startswith("--configuration=")),
        *(word[2:] for word in argv if re.match(r"-c.", word)),
    ]
    beside = Path(run_as.script).parent
    usual = [beside / _BESIDE[0], beside / _BESIDE[1], *(folder / path for path in _USUAL)]
    places = [folder / path for path in given] or usual
    return next((path.resolve() for path in places if path.is_file()), None)


def _jobs(instance: Instance, wanted: Wanted, found: Sequence[Running]) -> Iterator[Job]:
    states = instance.states()
    for path, name, options in instance.sections():
        # supervisord runs no shell: what looks like one is passed on as it is.
        command = options.get("command") or ""
        mine = _of(name, states)
        pids = tuple(
            one.pid
            for one in found
            if any(pid and carries(pid, one, found) for _, pid in mine.values())
        )
        running = [full for full, (state, _) in mine.items() if state in _RUNS]
        autostart = (options.get("autostart") or "true").lower() not in ("false", "no", "off", "0")
        meant = name in wanted.services or pids or wanted.runs(programs(_words(command)))
        if meant and (running or autostart):
            edited = path if autostart else None
            yield Job(
                supervisor="supervisord",
                name=name,
                command=masked(command),
                undo=_by_hand(instance, name, running, edited),
                pids=pids,
                place=str(instance.config),
                facts={
                    "supervisorctl": instance.supervisorctl,
                    "file": str(path),
                    "running": " ".join(running),
                    "autostart": autostart,
                },
            )


def _by_hand(instance: Instance, name: str, running: Sequence[str], edited: Path | None) -> str:
    """How a person undoes what holding a program does; `edited` is the file that gets a line."""
    ctl = f"{instance.supervisorctl} -c {instance.config}"
    steps = [
        *([f"in {edited} take the line marked '{MARK} {name}' out"] if edited else []),
        *([f"{ctl} start {' '.join(running)}"] if running else []),
    ]
    return "; ".join(steps)


def _instance(job: Job) -> Instance:
    return Instance(str(job.facts["supervisorctl"]), Path(job.place))


def _of(name: str, states: Mapping[str, tuple[str, int]]) -> dict[str, tuple[str, int]]:
    """The processes of a program: `name`, `group:name`, and `name:name_00` for several."""
    return {
        full: state
        for full, state in states.items()
        if full == name or name in full.split(":") or full.startswith(f"{name}:")
    }


def _names(instance: Instance, name: str) -> list[str]:
    return [full for full, (state, _) in _of(name, instance.states()).items() if state in _RUNS]


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:
        return command.split()
