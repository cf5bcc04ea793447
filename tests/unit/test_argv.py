"""What a command line runs, and what merely has a name standing on it."""

import pytest

from helena_cli.host.argv import Program, program, programs, run_by, shell_programs
from helena_cli.host.processes import is_helena

NAMES = ("morning_brief", "realtime_md_watcher")


@pytest.mark.parametrize(
    "line",
    [
        "python morning_brief.py",
        "/usr/bin/python3.11 -u /opt/morning_brief.py --fast",
        "/opt/v/bin/pypy3 -W ignore morning_brief.py",
        "/Library/Frameworks/Python.app/Contents/MacOS/Python morning_brief.py",
        "python3 -X dev -Wonce -- morning_brief.py",
        "python -m morning_brief",
        "python -um morning_brief",
        "python -Im pkg.morning_brief",
        "python -m morning_brief.__main__",
        "python /opt/morning_brief/__main__.py",
        "python /opt/morning_brief.pyz",
        "python /opt/morning_brief/",
        "python3 /usr/local/bin/morning-brief",
        "bash -eu /opt/morning_brief.sh",
        "bash -o pipefail morning_brief.sh",
        "-zsh morning_brief",
        "node --require ./x morning_brief.js",
        "deno run morning_brief.ts",
        "ruby -I lib morning_brief.rb",
        "perl -w morning_brief.pl",
        "php -f morning_brief.php",
        "./morning_brief",
    ],
)
def test_a_script_or_module_is_found_behind_its_interpreter(line: str):
    assert program(line.split()).is_called(NAMES) == "morning_brief"


@pytest.mark.parametrize(
    "line",
    [
        "vim morning_brief.py",
        "emacs -nw /opt/morning_brief.py",
        "tail -f morning_brief.log",
        "grep -r morning_brief .",
        "less morning_brief",
        "bash",
        "-bash",
        "bash -s morning_brief",
        "sh -c morning_brief.py",
        "bash -lc morning_brief",
        "bash --rcfile morning_brief -i",
        "python",
        "python -",
        "python -c morning_brief",
        "python -Bc morning_brief",
        "python -X morning_brief other.py",
        "python other.py morning_brief.py",
        "python -m other morning_brief.py",
        "python -m black morning_brief.py",
        "python /usr/bin/ranger morning_brief.py",
        "node -e morning_brief",
        "node other.js morning_brief.js",
        "python my_morning_brief.py",
        "python morning_brief_test.py",
        "python -m morning_brief.tests",
        "",
    ],
)
def test_a_name_that_only_stands_on_the_line_is_not_what_runs(line: str):
    assert program(line.split()).is_called(NAMES) is None


@pytest.mark.parametrize(
    "line",
    [
        "cd /opt && nice -n 5 python3 morning_brief.py >> log 2>&1",
        "FOO=1 /usr/bin/env BAR=2 python morning_brief.py",
        "cd /opt; uv run --with x morning_brief.py",
        "uv run -m morning_brief",
        "poetry run python -m morning_brief",
        "flock -n /tmp/lock -c 'python morning_brief.py'",
        "timeout -k 5 300 flock -w 3 /tmp/lock python morning_brief.py",
        "if [ -f x ]; then python morning_brief.py; fi",
        "sh -c 'exec python3 morning_brief.py'",
        "sudo -u alice /opt/morning_brief.py > /dev/null",
        "2>/dev/null nohup morning_brief &",
        "test -x y || (cd /opt\npython morning_brief.py)",
    ],
)
def test_a_configured_command_is_looked_through(line: str):
    assert run_by(shell_programs(line), NAMES) == "morning_brief"


@pytest.mark.parametrize(
    "line",
    [
        "grep morning_brief.py log",
        "echo python morning_brief.py",
        "python other.py > morning_brief.py",
        "cat < morning_brief.py",
        "tail -f log | tee morning_brief",
        "python 'never closed morning_brief.py",
        "",
    ],
)
def test_a_configured_command_that_only_mentions_a_name_is_not_meant(line: str):
    assert run_by(shell_programs(line), NAMES) is None


def test_a_name_may_be_given_with_its_ending():
    assert program(["python", "/opt/morning_brief.py"]).is_called(["morning_brief.py"])


@pytest.mark.parametrize("argv", [["env"], ["uv", "run"], ["flock", "-c"], ["timeout", "5"], []])
def test_a_wrapper_around_nothing_runs_nothing(argv: list[str]):
    assert programs(argv) == []
    assert program([]) == Program()


@pytest.mark.parametrize(
    "line",
    ["python -m helena_cli watch", "/v/bin/python /v/bin/helena stop-realtime", "helena status"],
)
def test_helena_knows_herself(line: str):
    assert is_helena(line.split())


@pytest.mark.parametrize("line", ["python helena_realtime_processor.py", "vim helena", "python -"])
def test_helena_takes_nobody_else_for_herself(line: str):
    assert not is_helena(line.split())
