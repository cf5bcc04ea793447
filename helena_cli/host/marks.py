"""Lines of a configuration that are put out of force, and brought back exactly.

Only the marked lines are touched when they come back: what a person changed meanwhile stays.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

MARK = "helena stop-realtime"


def lines_of(text: str) -> list[str]:
    """Its lines, each with its end."""
    return [line for line in re.split(r"(?<=\n)", text) if line]


def put_out(text: str, meant: Callable[[str], bool], *, mark: str) -> str:
    """The text with this mark, which begins a comment, before each line that is meant."""
    return "".join(f"{mark}{line}" if meant(line) else line for line in lines_of(text))


def bring_back(text: str, meant: Callable[[str], bool], *, mark: str) -> str:
    """The text without this mark before each line that is meant."""
    return "".join(
        line.removeprefix(mark) if line.startswith(mark) and meant(line[len(mark) :]) else line
        for line in lines_of(text)
    )


def replace_file(path: Path, text: str) -> None:
    """Write the file in one step; its owner and permissions stay. Raises OSError."""
    path = path.resolve()
    state = path.stat()
    # With a dot: cron reads no such file in cron.d.
    fresh = path.with_name(f".{path.name}.helena")
    try:
        with fresh.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            os.chmod(fresh, state.st_mode & 0o7777)
            if (state.st_uid, state.st_gid) != (os.geteuid(), os.getegid()):
                os.chown(fresh, state.st_uid, state.st_gid)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def read_file(path: Path) -> str:
    """Its text with the line ends as they are. Raises OSError."""
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return file.read()
