"""Programs of the machine: every end is an answer, none an exception."""

import sys
from pathlib import Path

import psutil

from helena_cli.host.commands import FORBIDDEN, MISSING, TIMED_OUT, run


def test_the_answer_has_the_exit_code_and_both_streams():
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)"
    finished = run((sys.executable, "-c", code))
    assert (finished.code, finished.output, finished.error) == (7, "out\n", "err\n")


def test_arguments_reach_the_program_as_they_are_for_there_is_no_shell():
    odd = ("$HOME", "a b", "*", "; exit 3", "", "caf\udce9")
    code = "import os, sys; print(os.fsencode('|'.join(sys.argv[1:])))"
    finished = run((sys.executable, "-c", code, *odd))
    assert finished.output.strip() == str("|".join(odd).encode("utf-8", "surrogateescape"))


def test_it_reads_what_it_is_given_and_never_the_terminal():
    code = "import sys; print(sys.stdin.read(), sys.stdin.isatty())"
    assert run((sys.executable, "-c", code), stdin="a line").output == "a line False\n"
    assert run((sys.executable, "-c", code)).output == " False\n"


def test_output_that_is_no_text_is_no_error():
    code = r"import sys; sys.stdout.buffer.write(b'caf\xe9')"
    assert run((sys.executable, "-c", code)).output == "caf\ufffd"


def test_a_program_that_is_not_there_answers_127():
    finished = run(("no-such-program-of-helena",))
    assert finished.code == MISSING
    assert finished.error == "no-such-program-of-helena is not installed"


def test_a_program_that_cannot_be_run_answers_126(tmp_path: Path):
    assert run((str(tmp_path),)).code == FORBIDDEN


def test_a_program_that_hangs_is_killed_and_answers_124(tmp_path: Path):
    pid = tmp_path / "pid"
    finished = run(("sh", "-c", f"echo $$ >{pid}; exec sleep 60"), timeout=1)
    assert finished.code == TIMED_OUT
    assert "within 1 s" in finished.error
    assert not psutil.pid_exists(int(pid.read_text()))


def test_a_program_that_was_killed_answers_the_signal():
    assert run((sys.executable, "-c", "import os; os.kill(os.getpid(), 9)")).code == -9
