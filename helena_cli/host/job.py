"""What the background service runs, the same for every service manager."""

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from unicodedata import category

import platformdirs
from msgspec import Struct

from helena_cli import config
from helena_cli.errors import ConfigurationError, UsageError
from helena_cli.settings import Settings

#: What a stop takes at worst after `shutdown_timeout`: the embedded server writes its checkpoint.
EMBEDDED_STOP = 90.0


class Job(Struct, frozen=True):
    """A command with everything that it needs: a service inherits nothing of our environment.

    Without control characters or bytes that are no text in anything but `command`.
    """

    command: tuple[str, ...]
    variables: Mapping[str, str]
    #: Relative paths of the configuration mean the same there as here.
    folder: str
    #: A file of further variables, for what must not stand in the service's own.
    secrets: str
    #: The command may take so many seconds to end.
    stop_seconds: float


def watch(settings: Settings, paths: Sequence[str] = ()) -> Job:
    """`helena watch` on these paths, else on the configured roots, with the settings as they are.

    Raises ConfigurationError for a password among the variables, and for a name that no service
    file can hold; UsageError without anything to watch, and for a path that is no folder.
    """
    _check_places(settings, paths)
    options = []
    if settings.config_file is not None:
        options += ["--config", str(settings.config_file)]
    if settings.origin("database.dsn") == "--dsn":
        options += ["--dsn", str(settings.database.dsn)]
    folders = tuple(os.path.abspath(path) for path in paths)
    variables = {**_own_modules(), **config.service_variables(settings)}
    if folders and all(map(_fits_a_list, folders)):
        # As roots, not as paths: what is not mounted yet when the service starts is waited for.
        variables["HELENA_DOCUMENTS_ROOTS"] = ",".join(folders)
    elif folders:
        options += ["--", *folders]
    job = Job(
        command=(*_program(), "watch", *options),
        variables=variables,
        folder=os.getcwd(),
        secrets=str(platformdirs.user_config_path("helena") / "service.env"),
        stop_seconds=settings.batch.shutdown_timeout + EMBEDDED_STOP,
    )
    for text in (job.folder, job.secrets, *job.variables.values()):
        refuse_unwritable(text)
    return job


def _check_places(settings: Settings, paths: Sequence[str]) -> None:
    if not paths and not settings.documents.roots:
        raise UsageError(
            "There is nothing to watch.", remedy="Give a PATH, or set [documents] roots."
        )
    for path in paths:
        if not os.path.isdir(path):
            raise UsageError(
                f"There is no folder {path!r}.",
                remedy="Give folders that exist; what is in [documents] roots may come later.",
            )


def _fits_a_list(folder: str) -> bool:
    """Whether a variable with a list of folders can hold it."""
    return "," not in folder and folder == folder.strip() and all(map(has_place, folder))


def _program() -> tuple[str, ...]:
    """The `helena` of this Python environment, or this Python with the package."""
    installed = shutil.which("helena", path=os.path.join(sys.prefix, "bin"))
    return (installed,) if installed else (sys.executable, "-P", "-m", "helena_cli")


def _own_modules() -> dict[str, str]:
    """Where the package lies, when it is run from its source."""
    if len(_program()) == 1:
        return {}
    return {"PYTHONPATH": str(Path(config.__file__).parent.parent)}


def refuse_unwritable(text: str) -> None:
    """A line of a unit file loses spaces at its end, and a backslash there joins it to the next."""
    if text != text.strip() or text.endswith("\\") or not all(map(has_place, text)):
        raise ConfigurationError(
            f"{text!r} cannot be written into the file of a service.",
            remedy="It has a control character, or a space or backslash at its end. It is the "
            "current folder, the state directory or a variable of the environment: change it.",
        )


def has_place(character: str) -> bool:
    """Neither a control character, nor half of one, nor one that Unicode has promised not to use.

    systemd and XML refuse them.
    """
    number = ord(character)
    never = number & 0xFFFE == 0xFFFE or 0xFDD0 <= number <= 0xFDEF
    return not never and category(character) not in ("Cc", "Cs")
