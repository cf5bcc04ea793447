"""A file of this machine that keeps what Helena did to what belongs to others."""

import json
import os
import platform
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil


def note(path: Path, events: Iterable[Mapping[str, Any]]) -> None:
    """Append one line of JSON for each, with time, host and user; readable for its owner only.

    Raises OSError.
    """
    about = {
        "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "host": platform.node(),
        "by": psutil.Process().username(),
    }
    lines = "".join(f"{json.dumps(about | dict(event))}\n" for event in events)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with open(descriptor, "ab") as file:
        file.write(lines.encode())
