"""Whom an SQLSTATE concerns."""

import pytest

from helena_cli.database.failure import Failure, classify

CLASSES: dict[Failure, list[str | None]] = {
    Failure.TRANSIENT: [
        None, "08000", "08003", "08006", "40001", "40P01", "53000", "53100", "53200", "53300",
        "57P01", "57P02", "57P03", "57P04", "57P05", "57014", "25006",
    ],
    Failure.ROW: [
        "21000", "22001", "22003", "22007", "22008", "22P02", "22021", "22023", "23502", "23503",
        "23505", "23514", "23P01", "44000", "54000", "54001", "54011", "P0001",
    ],
    Failure.GROUP: ["42703", "42804", "428C9", "42P10", "55000"],
    Failure.LANE: ["42P01", "3F000", "2200H", "55P03"],
    Failure.PERMISSION: ["42501"],
    Failure.UNKNOWN: [
        "", "0A000", "25001", "25P02", "25P03", "42601", "42883", "42P07", "42P22", "55006",
        "57000", "58030", "P0002", "XX000", "XX001", "HV000", "3D000",
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("sqlstate", "expected"),
    [(sqlstate, failure) for failure, codes in CLASSES.items() for sqlstate in codes],
)
def test_an_sqlstate_concerns_whom_the_table_of_failures_says(
    sqlstate: str | None, expected: Failure
):
    assert classify(sqlstate) is expected
