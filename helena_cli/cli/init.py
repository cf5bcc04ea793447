"""`helena init`: the tables in the database, their SQL, a configuration file, or a new spool."""

from pathlib import Path
from typing import Annotated

import typer

from helena_cli.cli import render
from helena_cli.cli.options import Common, Yes, with_common_options
from helena_cli.errors import ConfigurationError, ExitCode, UsageError

Print = Annotated[
    bool, typer.Option("--print", help="Print the SQL for somebody else to run, and do nothing.")
]
WriteConfig = Annotated[
    bool,
    typer.Option(
        "--write-config",
        help="Write a configuration file (--config, $HELENA_CONFIG or ./helena.toml), and no more.",
    ),
]


NewSpool = Annotated[
    bool,
    typer.Option(
        "--new-spool",
        help="After a spool was restored from a backup: let it start again. What is queued in it"
        " becomes dead letters, for it may have been written already.",
    ),
]


@with_common_options
def command(
    common: Common,
    print_sql: Print = False,
    write_config: WriteConfig = False,
    new_spool: NewSpool = False,
    yes: Yes = False,
) -> ExitCode:
    """Create or upgrade the tables that Helena knows; safe to run again."""
    if print_sql + write_config + new_spool > 1:
        raise UsageError(
            "--print, --write-config and --new-spool are different things.",
            remedy="Give one of them.",
        )
    if write_config:
        return _write_config(common)
    if print_sql:
        return _print_sql(common)
    if new_spool:
        return _renew_spool(common, yes=yes)
    return _create_tables(common)


def _create_tables(common: Common) -> ExitCode:
    from helena_cli.database import schema
    from helena_cli.runtime import Runtime

    with Runtime(common.settings()) as runtime:
        target = runtime.target.label
        with runtime.connect("init") as connection:
            created = [*runtime.created, *schema.initialise(connection)]
    if common.json:
        render.print_json({"target": target, "created": created})
    elif created:
        print(f"Created in {target}: {', '.join(created)}.")
    else:
        print(f"Nothing to do: {target} has all that Helena needs.")
    return ExitCode.DONE


def _print_sql(common: Common) -> ExitCode:
    from helena_cli.database import schema

    script = schema.sql()
    render.print_json({"sql": script}) if common.json else print(script, end="")
    return ExitCode.DONE


def _renew_spool(common: Common, *, yes: bool) -> ExitCode:
    from helena_cli.runtime import Runtime

    # The person may think for long, and nobody may begin to write meanwhile.
    with Runtime(common.settings()) as runtime, runtime.no_flusher():
        queued = runtime.spool.queue().total
        count = render.many(queued, "queued operation")
        if queued:
            render.confirm(f"Turn {count} into dead letters?", yes=yes)
        runtime.spool.renew_identity(
            "it was started again by hand (init --new-spool), so that may have been written already"
        )
    if common.json:
        render.print_json({"dead_letters": queued})
    else:
        print(f"The spool starts again; {count} became dead letters.")
        if queued:
            render.say("Look at them: helena dead-letters list. Then retry or drop them.")
    return ExitCode.DONE


def _write_config(common: Common) -> ExitCode:
    from helena_cli.config import check_dsn_option, file_to_write

    path = file_to_write(common.config)
    text = _example()
    if common.dsn is not None:
        check_dsn_option(common.dsn)
        text = _with_dsn(text, common.dsn)
    try:
        with path.open("x", encoding="utf-8") as file:
            path.chmod(0o600)  # a DSN with a password may be added later
            file.write(text)
    except FileExistsError:
        raise ConfigurationError(
            f"{path} exists already; it was not touched.",
            remedy="Edit it, or name another file with --config.",
        ) from None
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be written: {error.strerror}.",
            remedy="Name another file with --config.",
        ) from error
    if common.json:
        render.print_json({"config_file": str(path)})
    else:
        print(f"Wrote {path}.")
        render.say("Next: look at [database] dsn there, then run: helena init")
    return ExitCode.DONE


def _example() -> str:
    """The example file: inside the installed package, or beside it in the source."""
    from importlib import resources

    package = resources.files("helena_cli")
    installed = package / "config.example.toml"
    source = Path(str(package)).parent / "config.example.toml"
    return (installed if installed.is_file() else source).read_text(encoding="utf-8")


def _with_dsn(example: str, dsn: str) -> str:
    import tomli_w

    line = tomli_w.dumps({"dsn": dsn}).strip()
    return "\n".join(line if old.startswith("# dsn = ") else old for old in example.split("\n"))
