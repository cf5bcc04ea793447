"""`helena service`: `helena watch` in the background, under systemd or launchd."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from helena_cli.cli import render
from helena_cli.cli.options import Common, with_common_options
from helena_cli.errors import ExitCode

if TYPE_CHECKING:
    from helena_cli.host.service_state import ServiceState
    from helena_cli.host.services import ServiceManager

app = typer.Typer(
    help="Run helena watch in the background, as a service of systemd or launchd.",
    rich_markup_mode=None,
    no_args_is_help=True,
)

Paths = Annotated[
    list[str] | None,
    typer.Argument(metavar="PATH", help="Folders to watch; else [documents] roots."),
]
Print = Annotated[
    bool, typer.Option("--print", help="Print the service's file, and change nothing.")
]


@app.command("install", short_help="Install and start it.")
@with_common_options
def install_command(common: Common, paths: Paths = None, print_file: Print = False) -> ExitCode:
    """Install the service and start it, now and at every login; safe to run again.

    It gets the settings of this call: the configuration file, the options, and what the environment
    says now. No password is written into its file.
    """
    from helena_cli.host import job, services

    wanted = job.watch(common.settings(), paths or ())
    if print_file:
        manager = services.usual()
        text = manager.text(wanted).decode()
        if common.json:
            render.print_json({"file": str(manager.file.path), "text": text})
        else:
            print(text, end="")
        return ExitCode.DONE
    manager = services.answering(wanted)
    done, hint = manager.install(wanted), manager.hint()
    if common.json:
        render.print_json({**_document(manager, manager.state()), "done": done, "hint": hint})
        return ExitCode.DONE
    _print_done(manager, done, nothing="it is installed just so, and runs")
    for line in (hint, f"Next: helena service status. Its log: {manager.logs}"):
        if line:
            render.say(line)
    return ExitCode.DONE


@app.command("uninstall", short_help="Stop and remove it.")
@with_common_options
def uninstall_command(common: Common) -> ExitCode:
    """Stop the service, which drains first, and remove it; safe to run again."""
    from helena_cli.host import services

    manager = services.answering()
    done = manager.uninstall()
    if common.json:
        render.print_json({**_document(manager, manager.state()), "done": done})
    else:
        _print_done(manager, done, nothing="it is not installed")
    return ExitCode.DONE


@app.command("status", short_help="Show whether it runs.")
@with_common_options
def status_command(common: Common) -> ExitCode:
    """Show whether the service is installed, enabled and running.

    Exits with 0 when it runs, and with 1 when it does not.
    """
    from helena_cli.host import services

    manager = services.answering()
    state = manager.state()
    if common.json:
        render.print_json(_document(manager, state))
    else:
        _print_state(manager, state)
    return ExitCode.DONE if state.active else ExitCode.PARTIAL


def _print_done(manager: "ServiceManager", done: Sequence[str], *, nothing: str) -> None:
    what = ", ".join(done) if done else f"nothing to do, {nothing}"
    print(f"{manager.name}: {render.plain(what)}.")


def _document(manager: "ServiceManager", state: "ServiceState") -> dict[str, Any]:
    return {
        "manager": manager.manager,
        "name": manager.name,
        "file": str(manager.file.path),
        "installed": state.installed,
        "enabled": state.enabled,
        "active": state.active,
        "state": state.state,
        "pid": state.pid,
        "since": render.instant(state.since),
        "restarts": state.restarts,
        "exit_code": state.exit_code,
        "text": state.text,
        "logs": manager.logs,
    }


def _print_state(manager: "ServiceManager", state: "ServiceState") -> None:
    style = render.STYLES["ok" if state.active else "critical"]
    starts = "starts by itself" if state.enabled else "does not start by itself"
    facts: list[tuple[str, object]] = [
        ("Service", f"{manager.name}, {'' if state.installed else 'not '}installed"),
        ("File", manager.file.path if state.installed else "-"),
        ("State", render.cell(f"{state.state}, {starts}", style)),
    ]
    if state.pid:
        facts.append(("Process", f"{state.pid} since {render.local_time(state.since)}"))
    if state.restarts:
        facts.append(("Restarts", f"{state.restarts:,}"))
    if state.exit_code is not None:
        signal = f"ended by signal {-state.exit_code}"
        facts.append(
            ("Last end", signal if state.exit_code < 0 else f"exit code {state.exit_code}")
        )
    if state.text:
        facts.append(("It says", state.text))
    if not state.installed:
        facts.append(("What to do", "helena service install PATH"))
    elif not state.active:
        facts.append(("What to do", f"See why: {manager.logs}; then: {manager.restart}"))
    elif not state.enabled:
        facts.append(("What to do", "helena service install, with the PATHs of before"))
    render.print_facts(facts)
