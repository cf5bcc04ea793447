"""Where errors end: what is said, and with which exit code."""

import pytest

from helena_cli import config
from helena_cli.cli import run
from helena_cli.errors import ConfigurationError, DatabaseUnreachable, HelenaError, SpoolFull
from helena_cli.settings import Settings


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """Makes every command end with this error before it does anything."""

    def fail_with(error: BaseException, cause: BaseException | None = None) -> None:
        def load(**_: object) -> Settings:
            raise error from cause

        monkeypatch.setattr(config, "load", load)

    return fail_with


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (HelenaError("It went wrong.", remedy="Mend it."), 1),
        (SpoolFull("It went wrong.", remedy="Mend it."), 1),
        (ConfigurationError("It went wrong.", remedy="Mend it."), 3),
        (DatabaseUnreachable("It went wrong.", remedy="Mend it."), 4),
    ],
)
@pytest.mark.parametrize("json_too", [[], ["--json"]])
def test_an_error_is_told_with_its_remedy_and_its_own_exit_code(
    failing, capsys, error: HelenaError, code: int, json_too: list[str]
):
    failing(error)
    assert run(["status", *json_too]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "helena: It went wrong.\n  what to do: Mend it.\n"


def test_causes_are_told_in_one_line_each_and_not_twice(failing, capsys):
    error = ConfigurationError("It went wrong.", remedy="Mend it.")
    cause = OSError("the disk is gone\nLINE 1: SELECT")
    cause.__cause__ = ValueError("went wrong")
    failing(error, cause)
    run(["status"])
    assert capsys.readouterr().err.splitlines() == [
        "helena: It went wrong.",
        "  because: the disk is gone",
        "  what to do: Mend it.",
    ]


def test_what_the_system_said_is_not_repeated_with_its_number(failing, capsys):
    cause = FileNotFoundError(2, "No such file or directory", "/nope")
    failing(ConfigurationError("/nope: No such file or directory.", remedy="Mend it."), cause)
    run(["status"])
    assert "because" not in capsys.readouterr().err


def test_a_bug_is_called_a_bug_and_shows_its_traceback_only_with_v(failing, capsys):
    failing(ZeroDivisionError("division by zero"))
    assert run(["status"]) == 70
    said = capsys.readouterr()
    assert said.out == ""
    assert "this is a bug in Helena: ZeroDivisionError: division by zero" in said.err
    assert "-v" in said.err
    assert "Traceback" not in said.err
    assert run(["status", "-v"]) == 70
    assert "Traceback" in capsys.readouterr().err
    assert run(["status"]) == 70
    assert "Traceback" not in capsys.readouterr().err


def test_an_interruption_is_130_and_says_that_nothing_is_lost(failing, capsys):
    failing(KeyboardInterrupt())
    assert run(["status"]) == 130
    assert "stays in the queue" in capsys.readouterr().err


def test_wrong_usage_is_2(capsys):
    assert run(["status", "--no-such-option"]) == 2
    assert capsys.readouterr().out == ""


def test_help_is_0(capsys):
    assert run(["process-pending", "--help"]) == 0
    assert "--dry-run" in capsys.readouterr().out
