"""What is written down is true: help, README, example configuration and public names."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer.main

import helena_cli
from helena_cli.cli import app
from helena_cli.errors import ExitCode
from helena_cli.settings import SECTIONS, Rules

PROJECT = Path(helena_cli.__file__).parent.parent
EXAMPLE = (PROJECT / "config.example.toml").read_text(encoding="utf-8")

PUBLIC_NAMES = {
    *("add_operation", "add_operations", "flush", "BatchEngine"),
    *("add_document_reference", "add_message", "add_agent_context", "log_document_usage"),
}


def readme() -> str:
    return (PROJECT / "README.md").read_text(encoding="utf-8")


def commands(group: Any, path: str = "helena") -> Iterator[tuple[str, Any]]:
    """Each command with its full name, groups too."""
    for name, command in group.commands.items():
        yield f"{path} {name}", command
        if hasattr(command, "commands"):
            yield from commands(command, f"{path} {name}")


COMMANDS = dict(commands(typer.main.get_command(app)))
LEAVES = {name: command for name, command in COMMANDS.items() if not hasattr(command, "commands")}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_does(name: str):
    assert COMMANDS[name].help.strip().endswith(".")


@pytest.mark.parametrize("name", LEAVES)
def test_every_option_says_what_it_does(name: str):
    silent = [parameter.name for parameter in LEAVES[name].params if not parameter.help]
    assert silent == []


@pytest.mark.parametrize("name", LEAVES)
def test_every_command_takes_the_common_options(name: str):
    given = {option for parameter in LEAVES[name].params for option in parameter.opts}
    assert {"--config", "--dsn", "--json", "-v", "--version"} <= given


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_the_readme(name: str):
    assert name in readme()


def test_the_exit_codes_in_the_readme_are_those_of_the_program():
    table = re.search(r"exit codes?\b.*?\n((?:\|.*\n)+)", readme(), flags=re.IGNORECASE | re.DOTALL)
    assert table, "the README has no table of exit codes"
    codes = re.findall(r"^\|\s*`?(\d+)`?\s*\|", table[1], flags=re.MULTILINE)
    assert [int(code) for code in codes] == sorted(ExitCode)


# The example configuration


def keys() -> Iterator[tuple[str, str]]:
    """Every key that can be set, with its section as the file spells it."""
    for section, kind in SECTIONS.items():
        for field in msgspec.structs.fields(kind):
            if field.type is Rules:
                rules = msgspec.structs.fields(Rules)
                yield from ((f"{section}.{field.name}", rule.name) for rule in rules)
            else:
                yield section, field.name


def section_text(section: str) -> str:
    _, _, rest = EXAMPLE.partition(f"[{section}]\n")
    return re.split(r"^\[[a-z.]+\]$", rest, flags=re.MULTILINE)[0]


def test_the_example_holds_nothing_but_the_defaults():
    for section, table in tomllib.loads(EXAMPLE).items():
        assert msgspec.convert(table, SECTIONS[section]) == SECTIONS[section]()
        assert set(table) <= {field.name for field in msgspec.structs.fields(SECTIONS[section])}


@pytest.mark.parametrize(("section", "key"), list(keys()))
def test_the_example_explains_every_key(section: str, key: str):
    found = re.search(rf"^((?:# .+\n)+)(# )?{key} = ", section_text(section), flags=re.MULTILINE)
    assert found, f"[{section}] {key} is missing, or has no comment above it"
    assert re.search(r"[.:]$|\.\.\.$", found[1].strip())


def test_the_example_has_no_key_that_the_program_does_not_know():
    known = set(keys())
    for section in re.findall(r"^\[([a-z.]+)\]$", EXAMPLE, flags=re.MULTILINE):
        written = re.findall(r"^(?:# )?([a-z_]+) = ", section_text(section), flags=re.MULTILINE)
        assert {(section, key) for key in written} <= known


# The public names


def test_the_package_offers_exactly_the_documented_names():
    assert set(helena_cli.__all__) == PUBLIC_NAMES
    for name in PUBLIC_NAMES:
        assert getattr(helena_cli, name).__doc__
        assert name in readme()
