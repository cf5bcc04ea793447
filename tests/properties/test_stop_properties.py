"""Command lines of any kind, and files that are marked and restored."""

import shlex

from hypothesis import example, given
from hypothesis import strategies as st

from helena_cli.host.argv import program, programs, run_by, shell_programs
from helena_cli.host.marks import bring_back, put_out
from helena_cli.host.masking import masked, masked_command
from helena_cli.host.processes import is_helena
from helena_cli.host.supervisors.supervisord import _with_autostart, _without_autostart

#: Words that mean something, among any others.
WORDS = st.one_of(
    st.sampled_from(["python3", "bash", "node", "env", "uv", "run", "timeout", "flock", "sudo"]),
    st.sampled_from(["-m", "-c", "-um", "--", "-", "+", "A=b", "-u", "5", "--x=", "="]),
    st.sampled_from(["x.py", "/", "//", "a/", "if", "{"]),
    st.text(max_size=8),
)
TEXT = st.text(alphabet="ab #;\n\r\t\\'\"|&<>()%=[]", max_size=60)


@given(st.lists(WORDS, max_size=6))
@example(["python3", ""])
@example(["env", ""])
def test_whatever_another_process_has_on_its_line_is_read(argv: list[str]):
    for found in (program(argv), *programs(argv)):
        assert found.is_called(["never so called"]) is None
    is_helena(argv)
    masked_command(argv)


@given(TEXT)
def test_whatever_stands_in_a_crontab_is_read(text: str):
    assert run_by(shell_programs(text), ["never so called"]) is None
    masked(text)


@given(st.lists(WORDS.filter(lambda word: "\0" not in word), max_size=5))
def test_a_quoted_command_means_the_same_in_a_shell(rest: list[str]):
    argv = ["python3", "-u", "brief.py", *rest]
    assert run_by(shell_programs(shlex.join(argv)), ["brief"]) == "brief"


@given(st.text(alphabet="abcXYZ019/#?@:%", min_size=1), st.sampled_from(["x {}", "x 'y {} z'"]))
def test_no_password_gets_through(noise: str, around: str):
    secret = f"{noise}s3cret{noise}"
    for form in (f"--password={secret}", f"--token {secret}", f"pg://u:{secret}@host/db"):
        assert "s3cret" not in masked(around.format(form))


@given(TEXT, st.sets(st.integers(0, 5)))
def test_lines_that_are_marked_come_back_exactly(text: str, chosen: set[int]):
    lines = text.split("\n")
    wanted = {lines[number] for number in chosen if number < len(lines)}

    def meant(line: str) -> bool:
        return line.removesuffix("\n") in wanted

    marked = put_out(text, meant, mark="# mark: ")
    assert bring_back(marked, meant, mark="# mark: ") == text
    assert not any(meant(line) and line != "" for line in marked.splitlines())


SETTINGS = st.sampled_from(
    (
        *("autostart=true\n", "autostart = false\n", "autostart:yes\r\n", "command=x\n"),
        *("[program:a]\n", "[program:b] ; b\n", "[program:ab]\n", "[supervisord]\n"),
        *("; note\n", "\n", "  continued\n"),
    )
)


@given(st.lists(SETTINGS, max_size=12).map("".join), st.text(alphabet="abc=\n", max_size=5))
def test_a_configuration_of_supervisord_comes_back_exactly(text: str, end: str):
    for name in ("a", "b"):
        assert _with_autostart(_without_autostart(text + end, name), name) == text + end
