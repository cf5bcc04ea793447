"""An operation counts once, whatever happens to the answer, the server, or the spool."""

import threading
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from helena_cli.batch.flush import FlushFailed, Outcome
from tests.proxy import Proxy
from tests.writing import Desk, always

pytestmark = pytest.mark.postgres

#: Without a unique key a second insert would show.
LOG = "CREATE TABLE log (line int)"


@pytest.fixture
def far_desk(helena_dsn: str, proxy: Proxy) -> Iterator[Desk]:
    """A desk whose line can be cut."""
    desk = Desk(helena_dsn, through=proxy.dsn)
    yield desk
    desk.close()


def test_a_commit_whose_answer_was_lost_is_found_by_the_position(far_desk: Desk, proxy: Proxy):
    desk = far_desk
    desk.sql(LOG)
    for line in range(3):
        desk.add("insert", "log", line=line)
    with pytest.raises(FlushFailed) as caught:
        desk.flush(seal=lambda _: proxy.drop_next_answer(containing=b"COMMIT"))
    assert caught.value.sqlstate is None and not caught.value.unknown
    assert desk.one("SELECT count(*) FROM log") == 3
    desk.add("insert", "log", line=3)
    outcome = desk.flush()
    assert (outcome.skipped, outcome.written) == ((1, 2, 3), (4,))
    assert desk.sql("SELECT line FROM log ORDER BY line") == [(0,), (1,), (2,), (3,)]


def test_a_server_that_dies_before_the_commit_has_written_nothing(desk: Desk):
    desk.sql(LOG)
    desk.add("insert", "log", line=1)

    def kill(_: Outcome) -> None:
        desk.sql(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE application_name = 'helena flush' AND datname = current_database()"
        )

    with pytest.raises(FlushFailed):
        desk.flush(seal=kill)
    assert desk.one("SELECT count(*) FROM log") == 0
    # The nonce was made durable, so the next flush does not take the position for a copy's.
    assert desk.flush().written == (1,)
    assert desk.one("SELECT count(*) FROM log") == 1


def test_the_seal_comes_after_the_last_row_and_before_the_commit(desk: Desk):
    desk.sql(LOG)
    desk.add("insert", "log", line=1)
    seen: list[Any] = []

    def look(outcome: Outcome) -> None:
        seen.append((outcome.written, desk.one("SELECT count(*) FROM log")))

    outcome = desk.flush(seal=look)
    assert seen == [((1,), 0)]
    assert desk.sealed == [outcome]
    assert desk.one("SELECT count(*) FROM log") == 1


def test_a_seal_that_fails_leaves_the_database_as_it_was(desk: Desk):
    desk.sql(LOG)
    desk.add("insert", "log", line=1)

    def fail(_: Outcome) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        desk.flush(seal=fail)
    assert desk.one("SELECT count(*) FROM log") == 0
    assert (
        desk.one(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'helena flush'"
            " AND datname = current_database() AND state <> 'idle'"
        )
        == 0
    )
    assert desk.flush().written == (1,)
    assert desk.connected == ["flush"]


def test_an_interrupt_leaves_no_open_transaction(desk: Desk):
    desk.sql(LOG)
    desk.add("insert", "log", line=1)

    def interrupt(_: Outcome) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        desk.flush(seal=interrupt)
    assert desk.flush().written == (1,)


def test_a_commit_that_the_server_turns_into_a_rollback_is_a_failure(desk: Desk):
    desk.sql(LOG)
    desk.add("insert", "log", line=1)

    def break_transaction(_: Outcome) -> None:
        with pytest.raises(psycopg.Error):
            desk.sessions[-1].execute("SELECT 1 / 0")

    with pytest.raises(FlushFailed, match="rolled"):
        desk.flush(seal=break_transaction)
    assert desk.one("SELECT count(*) FROM log") == 0
    assert desk.flush().written == (1,)


def test_two_flushers_of_one_spool_write_each_operation_once(desk: Desk):
    desk.sql(LOG)
    other = Desk(desk.dsn)
    # They share what the spool knows, as two processes share its file.
    other.nonces = desk.nonces
    done: list[Desk] = []

    def flush_all(own: Desk) -> None:
        for number in range(40):
            own.next_id = number * 5 + 1
            for line in range(number * 5, number * 5 + 5):
                own.add("insert", "log", line=line)
            own.flush()
        done.append(own)

    threads = [threading.Thread(target=flush_all, args=(own,)) for own in (desk, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    other.close()
    assert len(done) == 2
    assert desk.one("SELECT count(*) FROM log") == 200
    assert desk.one("SELECT count(DISTINCT line) FROM log") == 200


def test_two_first_flushes_at_once_do_not_both_begin_at_the_beginning(desk: Desk):
    desk.sql(LOG)
    other = Desk(desk.dsn)
    desk.add("insert", "log", line=1)
    other.add("insert", "log", line=1)
    outcomes: list[Outcome] = []

    def second(_: Outcome) -> None:
        thread = threading.Thread(target=lambda: outcomes.append(other.flush()))
        thread.start()
        threads.append(thread)
        while not desk.one(
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            " AND datname = current_database()"
        ):
            pass
        other.nonces = desk.nonces

    threads: list[threading.Thread] = []
    desk.flush(seal=second)
    threads[0].join()
    other.close()
    # It began before it could know the other's nonce, so it waits; it does not write again.
    assert desk.one("SELECT count(*) FROM log") == 1
    assert set(outcomes[0].waiting) == {"log"} or outcomes[0].skipped == (1,)


def test_spools_do_not_share_positions(desk: Desk):
    desk.sql(LOG)
    other = Desk(desk.dsn, spool_id="another")
    for own in (desk, other):
        own.add("insert", "log", line=1)
        assert own.flush().written == (1,)
    other.close()
    assert desk.one("SELECT count(*) FROM log") == 2
    assert desk.one("SELECT count(DISTINCT nonce) FROM helena.spool_position") == 2


def test_a_position_that_another_copy_of_the_spool_wrote_stops_its_lane_only(desk: Desk):
    desk.sql(f"{LOG}; CREATE TABLE t (k int)")
    desk.add("insert", "log", line=1)
    desk.flush()
    desk.nonces["log"] = {"an older one"}
    desk.add("insert", "log", line=2)
    good = desk.add("insert", "t", k=1)
    outcome = desk.flush()
    assert "another copy of this spool" in outcome.waiting["log"].reason
    assert outcome.waiting["log"].remedy
    assert outcome.written == (good,)
    assert desk.position("log") == (1, [])


def test_operations_at_or_below_the_position_are_skipped_unless_they_are_held(desk: Desk):
    desk.sql(LOG)
    desk.sql(
        "INSERT INTO helena.spool_position (spool_id, table_name, last_operation_id, held)"
        " VALUES ('spool', 'log', 10, '{3,5,99}')"
    )
    desk.next_id = 2
    for line in range(2, 13):
        desk.add("insert", "log", line=line)
    outcome = desk.flush()
    assert outcome.skipped == (2, 4, 6, 7, 8, 9, 10)
    assert sorted(outcome.written) == [3, 5, 11, 12]
    # What the spool has not come to yet stays held.
    assert desk.position("log") == (12, [99])


def test_what_was_held_and_is_gone_from_the_spool_is_forgotten(desk: Desk):
    desk.sql("CREATE TABLE p (k int PRIMARY KEY); CREATE TABLE t (k int, p int REFERENCES p)")
    first = desk.add("insert", "t", k=1, p=1)
    second = desk.add("insert", "t", k=2, p=1)
    desk.flush(hold=always)
    assert desk.position("t") == (second, [first, second])
    del desk.pending[first]
    last = desk.add("insert", "t", k=3)
    desk.flush(hold=always)
    assert desk.position("t") == (last, [second])


def test_a_held_operation_that_is_not_due_stays_held(desk: Desk):
    desk.sql("CREATE TABLE p (k int PRIMARY KEY); CREATE TABLE t (k int, p int REFERENCES p)")
    desk.add("insert", "t", k=1, p=1)
    desk.flush(hold=always)
    desk.put_back(1, due=False)
    desk.sql("INSERT INTO p VALUES (1)")
    desk.add("insert", "t", k=2)
    outcome = desk.flush()
    assert (outcome.written, outcome.held) == ((2,), ())
    assert desk.position("t") == (2, [1])
    desk.put_back(1)
    assert desk.flush().written == (1,)


def test_a_position_never_goes_back(desk: Desk):
    desk.sql(LOG)
    desk.next_id = 100
    desk.add("insert", "log", line=1)
    desk.flush()
    desk.next_id = 5
    desk.add("insert", "log", line=1)
    assert desk.flush().skipped == (5,)
    assert desk.position("log") == (100, [])


@pytest.mark.parametrize(
    "moment", [b"BEGIN", b"helena.meta", b"spool_position", b"SAVEPOINT", b"INTO", b"COMMIT"]
)
def test_a_line_that_breaks_at_any_moment_loses_and_doubles_nothing(
    far_desk: Desk, proxy: Proxy, moment: bytes
):
    desk = far_desk
    desk.sql(LOG)
    for line in range(2):
        desk.add("insert", "log", line=line)
        proxy.drop_next_answer(containing=moment)
        with pytest.raises(FlushFailed):
            desk.flush()
        assert proxy.dropped.wait(10)
    desk.flush()
    assert not desk.pending
    assert desk.sql("SELECT line FROM log ORDER BY line") == [(0,), (1,)]
