"""The options that every command takes, in one place.

They stand after the command's name. A command is decorated with `with_common_options` and gets them
as its first argument; what it returns is its exit code.
"""

import functools
import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, NamedTuple, ParamSpec

import typer

from helena_cli.errors import ExitCode

if TYPE_CHECKING:
    from helena_cli.settings import Settings

Parameters = ParamSpec("Parameters")

PACKAGE_LOG = logging.getLogger("helena_cli")


def _show_version(asked: bool) -> None:
    if not asked:
        return
    # Imported here because it costs more than the rest of a start.
    from importlib.metadata import PackageNotFoundError, version

    try:
        print(f"helena {version('helena-cli')}")
    except PackageNotFoundError:
        print("helena, run from its source")
    raise typer.Exit(ExitCode.DONE)


def _be_verbose(asked: bool) -> None:
    if asked:
        PACKAGE_LOG.setLevel(logging.DEBUG)


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Configuration file; else $HELENA_CONFIG, ./helena.toml, or the user's own.",
    ),
]
Dsn = Annotated[
    str | None,
    typer.Option(
        "--dsn",
        metavar="DSN",
        help="The database, without a password; else $HELENA_DSN, the file, $DATABASE_URL, PG*.",
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print one JSON document on stdout and nothing else; after an error, nothing.",
    ),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "-v",
        "--verbose",
        callback=_be_verbose,
        help="Log to stderr what happens, and show the traceback of an error.",
    ),
]
Version = Annotated[
    bool,
    typer.Option(
        "--version",
        callback=_show_version,
        is_eager=True,
        help="Print the version and exit.",
    ),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do it without asking.")]


class Common(NamedTuple):
    """What was given for the common options."""

    config: Path | None
    dsn: str | None
    json: bool

    def settings(self) -> "Settings":
        """All sources merged. Raises ConfigurationError and UsageError."""
        from helena_cli.config import load

        return load(file=self.config, options={"database": {"dsn": self.dsn}})


def _declared(
    *,
    config: Config = None,
    dsn: Dsn = None,
    json: Json = False,
    verbose: Verbose = False,
    version: Version = False,
) -> None:
    """The common options as Typer reads them."""


def with_common_options(
    command: Callable[Concatenate[Common, Parameters], ExitCode],
) -> Callable[..., None]:
    """Give a command the common options; its result becomes the exit code.

    Typer knows no groups of parameters, so the wrapper shows it one signature: the command's own
    parameters, and the common ones behind them.
    """
    own = list(inspect.signature(command).parameters.values())[1:]
    common = inspect.signature(_declared).parameters

    @functools.wraps(command)
    def wrapper(*arguments: Parameters.args, **values: Parameters.kwargs) -> None:
        given: dict[str, Any] = {name: values.pop(name) for name in common}
        chosen = Common(*(given[name] for name in Common._fields))
        raise typer.Exit(command(chosen, *arguments, **values))

    shown = [*own, *common.values()]
    vars(wrapper)["__signature__"] = inspect.Signature(shown)
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    return wrapper
