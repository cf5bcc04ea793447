"""A key waits until it has been quiet, but never longer than the maximum wait."""

from helena_cli.documents.debounce import Debouncer


def debouncer() -> Debouncer[str]:
    return Debouncer(quiet=1.0, max_wait=3.0)


def test_nothing_is_due_when_nothing_was_offered():
    waiting = debouncer()

    assert waiting.take(1e9) == []
    assert waiting.next_due() is None
    assert len(waiting) == 0


def test_a_key_is_due_once_it_has_been_quiet():
    waiting = debouncer()
    waiting.offer("a", 10.0)

    assert waiting.take(10.9) == []
    assert waiting.next_due() == 11.0
    assert waiting.take(11.0) == ["a"]
    assert waiting.take(99.0) == []


def test_another_offer_begins_the_quiet_time_anew():
    waiting = debouncer()
    waiting.offer("a", 10.0)
    waiting.offer("a", 10.8)

    assert waiting.take(11.5) == []
    assert waiting.take(11.8) == ["a"]


def test_a_key_that_never_rests_is_due_after_the_maximum_wait():
    waiting = debouncer()
    for tenth in range(0, 31):
        waiting.offer("a", 10.0 + tenth / 10)

    assert waiting.take(12.9) == []
    assert waiting.take(13.0) == ["a"]


def test_after_it_was_taken_a_key_waits_anew():
    waiting = debouncer()
    waiting.offer("a", 10.0)
    waiting.take(11.0)
    waiting.offer("a", 11.5)

    assert waiting.take(12.4) == []
    assert waiting.take(12.5) == ["a"]


def test_keys_come_in_the_order_of_their_first_offer():
    waiting = debouncer()
    for key, at in (("b", 1.0), ("a", 1.1), ("b", 1.2)):
        waiting.offer(key, at)

    assert waiting.take(9.0) == ["b", "a"]


def test_all_of_them_can_be_taken_before_their_time():
    waiting = debouncer()
    waiting.offer("a", 10.0)
    waiting.offer("b", 10.5)

    assert waiting.take_all() == ["a", "b"]
    assert len(waiting) == 0
