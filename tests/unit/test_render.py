"""What a person sees: nothing cut off, nothing interpreted, nothing that moves the cursor."""

import io
import re
import sys

import pytest
from rich.text import Text

from helena_cli.cli import render
from helena_cli.errors import Refused

LONG = "SELECT " + ", ".join(f"column_{i}" for i in range(60))


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a[i]", "a[i]"),
        ("[/x]", "[/x]"),
        ("one\n  two\r\nthree", "one two three"),
        ("\x1b[2Jgone", "[2Jgone"),
        ("\x9b31mred", "31mred"),
        ("safe\u202egnp.exe", "safegnp.exe"),
        ("two  spaces", "two  spaces"),
        ("👩‍👧 ok", "👩‍👧 ok"),
        (None, ""),
        (5, "5"),
    ],
)
def test_text_from_outside_is_shown_as_it_is_without_control_characters(text: object, shown: str):
    assert render.plain(text) == shown
    assert render.cell(text).plain == shown


def test_a_table_on_a_pipe_keeps_every_cell_on_one_line(capsys: pytest.CaptureFixture[str]):
    render.print_table(("id", "query"), [(1, LONG), (2, "[/x]")])
    assert LONG in capsys.readouterr().out.splitlines()[1]


def test_a_table_on_a_narrow_terminal_folds_and_loses_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdout", screen := Terminal())
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    render.print_table(("id", "query"), [(1, LONG)])
    lines = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue()).splitlines()
    assert max(map(len, lines)) <= 40
    assert "…" not in screen.getvalue()
    shown = "".join(line.removeprefix("1").strip() for line in lines[1:])
    assert shown.replace(" ", "") == LONG.replace(" ", "")


def test_colours_are_for_terminals_and_not_with_no_color(monkeypatch: pytest.MonkeyPatch):
    def coloured(stream: io.StringIO) -> bool:
        monkeypatch.setattr(sys, "stdout", stream)
        render.print_table(("status",), [(render.cell("critical", "bold red"),)])
        return "\x1b[1;31m" in stream.getvalue()

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert coloured(Terminal())
    assert not coloured(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not coloured(Terminal())


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "-"),
        (0, "0.0 s"),
        (9.96, "10.0 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (3599, "59 min"),
        (7500, "2 h 5 min"),
        (266_400, "3 d 2 h"),
    ],
)
def test_a_duration_is_said_as_a_person_says_it(seconds: float | None, shown: str):
    assert render.duration(seconds) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 bytes"), (1023, "1,023 bytes"), (1536, "1.5 KiB"), (5 * 1024**4, "5,120.0 GiB")],
)
def test_bytes_are_said_as_a_person_says_them(count: int, shown: str):
    assert render.size(count) == shown


def test_an_instant_in_json_is_utc():
    assert render.instant(0) == "1970-01-01T00:00:00.000+00:00"
    assert render.instant(None) is None


def test_json_survives_a_file_name_that_is_not_unicode(capsys: pytest.CaptureFixture[str]):
    render.print_json({"path": b"caf\xe9.md".decode("utf-8", "surrogateescape")})
    assert '"caf\\udce9.md"' in capsys.readouterr().out


def test_a_question_without_a_terminal_is_a_refusal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(Refused, match="no terminal"):
        render.confirm("Delete everything?", yes=False)
    render.confirm("Delete everything?", yes=True)


@pytest.mark.parametrize(
    ("answer", "agreed"), [("y\n", True), ("YES\n", True), ("\n", False), ("", False)]
)
def test_only_yes_is_yes(answer: str, agreed: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    if agreed:
        render.confirm("Delete everything?", yes=False)
        return
    with pytest.raises(Refused, match="Nothing was changed"):
        render.confirm("Delete everything?", yes=False)


def test_a_cell_keeps_its_own_style():
    assert isinstance(render.cell("ok", "green"), Text)
    assert str(render.cell("ok", "green").style) == "green"


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]):
    with render.progress("Documents") as step:
        step(1, None, "a.md")
    assert capsys.readouterr().err == ""
