"""What systemd-analyze reads in a unit file."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from helena_cli.host import unit
from helena_cli.host.job import Job

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)

#: Words that a careless file would change.
ODD = (
    "%h %%",
    "$HOME ${X} $$",
    "q\"uo'te",
    "back\\slash\\",
    "new\nline\t\r",
    "ümlaut 🎉",
    "-x",
    ";",
)


def a_job(*arguments: str, variables: dict[str, str] | None = None, folder: str = "/tmp") -> Job:
    return Job(("/bin/true", *arguments), variables or {}, folder, "/tmp/service.env", 100.0)


class Analysed:
    """What systemd-analyze says of a unit: its complaints, and each value as systemd reads it."""

    def __init__(self, text: str, folder: Path) -> None:
        path = folder / unit.NAME
        path.write_text(text, encoding="utf-8")
        command = ["systemd-analyze", "verify", "--user", "--man=no", str(path)]
        quiet = {"PATH": "/usr/bin:/bin", "XDG_RUNTIME_DIR": str(folder), "HOME": str(folder)}
        plain = subprocess.run(command, capture_output=True, text=True, env=quiet)
        self.code, self.complaints = plain.returncode, plain.stderr
        # With debugging on it shows all that it has read.
        loud = {**quiet, "SYSTEMD_LOG_LEVEL": "debug"}
        self.dump = subprocess.run(command, capture_output=True, env=loud).stdout

    def values(self, name: str) -> list[str]:
        return [
            line.strip().removeprefix(f"{name}: ")
            for line in self.dump.decode(errors="surrogateescape").split("\n")
            if line.strip().startswith(f"{name}: ")
        ]

    def command(self) -> list[bytes]:
        """The command line, out of the quotes in which systemd shows it."""
        line = next(line for line in self.dump.split(b"\n") if b"Command Line: " in line)
        quoted = line.partition(b"Command Line: ")[2]
        words = re.findall(rb'"((?:[^"\\]|\\.)*)"|([^ "]+)', quoted)
        return [plain or _unescaped(inner) for inner, plain in words]


def _unescaped(word: bytes) -> bytes:
    names = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"a": b"\a", b"b": b"\b", b"f": b"\f"}
    names[b"v"] = b"\v"

    def meant(match: re.Match[bytes]) -> bytes:
        code = match[1]
        return bytes([int(code, 8)]) if len(code) == 3 else names.get(code, code)

    return re.sub(rb"\\([0-7]{3}|.)", meant, word)
