"""cron: the lines of crontabs, put out of force by a mark and brought back exactly."""

import os
import pwd
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
from msgspec import Struct

from helena_cli.errors import HelenaError
from helena_cli.host.argv import shell_programs
from helena_cli.host.marks import MARK, bring_back, put_out, read_file, replace_file
from helena_cli.host.masking import masked
from helena_cli.host.processes import Running, ancestors, command_line
from helena_cli.host.supervisors import Job, Wanted, refused

SYSTEM_TABLES = (Path("/etc/crontab"), Path("/etc/cron.d"))
#: Where each user's own table lies, under the user's name: Debian, Red Hat, macOS.
SPOOLS = (
    Path("/var/spool/cron/crontabs"),
    Path("/var/spool/cron"),
    Path("/usr/lib/cron/tabs"),
)

#: Seconds for the crontab program.
ASK = 10.0

_MARK = f"# {MARK}: "
_TIME = r"(?:@\w+|(?:[\w*/,~?-]+\s+){4}[\w*/,~?-]+)\s+"


class Table(Struct, frozen=True):
    """A crontab: of a user, through the crontab program, or a file of the system's."""

    place: str
    system: bool

    def read(self) -> str:
        """Its text; empty when there is none, or it may not be read."""
        if self.system:
            try:
                return read_file(Path(self.place))
            except OSError:
                return ""
        code, output, _ = self._crontab("-l")
        return output if code == 0 else ""

    def write(self, text: str) -> None:
        """Put the text in its place. Raises HelenaError."""
        if self.system:
            try:
                replace_file(Path(self.place), text)
            except OSError as error:
                raise HelenaError(
                    f"{self.place} cannot be written: {error.strerror}.",
                    remedy="Tables of the system need root: run the same command with sudo.",
                ) from error
            return
        code, _, said = self._crontab("-", text)
        if code:
            raise refused(
                f"The crontab of {self.place} was not accepted",
                said,
                remedy="Comment the line out by hand: crontab -e",
            )

    def jobs(self) -> Iterator[tuple[str, str]]:
        """Each line that is in force, and the shell's command on it."""
        user = r"[\w.-]+\s+" if self.system else ""
        for line in self.read().split("\n"):
            entry = re.fullmatch(rf"\s*-?{_TIME}{user}(.+)", line)
            if entry:
                # What follows a bare percent sign is the command's input.
                yield line, re.split(r"(?<!\\)%", entry[1])[0].replace("\\%", "%").strip()

    @property
    def label(self) -> str:
        return self.place if self.system else f"crontab of {self.place}"

    def _crontab(self, word: str, text: str = "") -> tuple[int, str, str]:
        """Run the crontab program: its code, output and error, every byte as it is."""
        own = self.place == _user()
        argv = ["crontab", *([] if own else ["-u", self.place]), word]
        try:
            ended = subprocess.run(argv, input=_bytes(text), capture_output=True, timeout=ASK)
        except (OSError, subprocess.TimeoutExpired) as error:
            return 1, "", str(error)
        return ended.returncode, _text(ended.stdout), _text(ended.stderr)


class Cron:
    """The crontabs that this user may read: all of them for root."""

    def __init__(self, system_tables: Sequence[Path] = SYSTEM_TABLES) -> None:
        self._system_tables = system_tables

    def jobs(self, wanted: Wanted, found: Sequence[Running]) -> list[Job]:
        """Lines that run what is wanted, or have started what was found."""
        started = {one.pid: _shell_texts(one.process) for one in found}
        jobs = []
        for table in self._tables(found):
            for line, command in table.jobs():
                pids = tuple(pid for pid, texts in started.items() if command in texts)
                if pids or wanted.runs(shell_programs(command)):
                    jobs.append(_job(table, line, pids))
        return jobs

    def hold(self, job: Job, grace: float) -> None:
        """Put the line behind a mark. Raises HelenaError."""
        table = _table(job)
        text = table.read()
        changed = put_out(text, _is(str(job.facts["line"])), mark=_MARK)
        if changed != text:
            table.write(changed)

    def release(self, job: Job) -> None:
        """Bring the line back as it was. Raises HelenaError."""
        table, line = _table(job), str(job.facts["line"])
        text = table.read()
        changed = bring_back(text, _is(line), mark=_MARK)
        if changed != text:
            table.write(changed)
        elif line not in text.split("\n"):
            raise HelenaError(
                f"The marked line is no longer in the {table.label}.",
                remedy=f"If it is still wanted, add it by hand: {job.command}",
            )

    def _tables(self, found: Sequence[Running]) -> Iterator[Table]:
        users = {_user()}
        if os.geteuid() == 0:
            users |= {one.user for one in found}
            users |= {path.name for spool in SPOOLS for path in _files(spool)}
        for user in sorted(users):
            yield Table(user, system=False)
        for place in self._system_tables:
            for path in _files(place):
                yield Table(str(path), system=True)


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # as in a container that was given any uid
        return str(os.geteuid())


def _files(place: Path) -> list[Path]:
    try:
        found = [place] if place.is_file() else sorted(place.iterdir())
        return [path for path in found if path.is_file() and not path.name.startswith(".")]
    except OSError:
        return []


def _shell_texts(process: psutil.Process) -> set[str]:
    """The commands that shells above this process were given, as cron does."""
    lines = [command_line(one) for one in ancestors(process)]
    return {argv[2] for argv in lines if len(argv) == 3 and argv[1] == "-c"}


def _job(table: Table, line: str, pids: tuple[int, ...]) -> Job:
    undo = f"in {table.place}" if table.system else "crontab -e"
    return Job(
        supervisor="cron",
        name=table.label,
        command=masked(line.strip()),
        undo=f"{undo}: take the mark before the line away",
        pids=pids,
        place=table.place,
        facts={"line": line, "system": table.system},
    )


def _table(job: Job) -> Table:
    return Table(job.place, system=bool(job.facts["system"]))


def _is(line: str) -> Callable[[str], bool]:
    return lambda other: other.removesuffix("\n") == line


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _text(output: bytes) -> str:
    return output.decode("utf-8", "surrogateescape")
