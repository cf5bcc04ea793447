"""A command line that is shown tells no password."""

import shlex

import pytest

from helena_cli.host.masking import masked, masked_command


@pytest.mark.parametrize(
    "line",
    [
        "x --password s3cret",
        "x --password=s3cret",
        "x --db-password 's3cret and more'",
        "x --API-KEY s3cret",
        "x --token=s3cret",
        "x postgresql://me:s3cret@host/db",
        "x postgresql://me:s3cret/with#odd?marks@host/db",
        "x postgresql://:s3cret@host/db",
        "x 'postgresql://host/db?user=me&password=s3cret'",
        "x \"host=h password='s3cret' dbname=d\"",
        "x 'host=h password = s3cret dbname=d'",
        "PGPASSWORD=s3cret x",
        "sh -c 'PGPASSWORD=s3cret x --password s3cret'",
    ],
)
def test_a_password_is_not_shown(line: str):
    for shown in (masked(line), masked_command(shlex.split(line))):
        assert "s3cret" not in shown
        assert "***" in shown


def test_what_is_no_password_stays():
    line = "python /opt/x.py --user me --port 5432 postgresql://me@host:5432/db"
    assert masked(line) == line
    assert masked_command(line.split()) == line


def test_a_masked_command_keeps_what_stands_beside_the_password():
    shown = masked_command(["x", "postgresql://me:pw@host/db", "--password", "pw", "-v"])
    assert shown == "x 'postgresql://me:***@host/db' --password *** -v"
