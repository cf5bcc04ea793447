"""Whatever is offered whenever: nothing is lost, nothing is early, nothing waits too long."""

from hypothesis import given
from hypothesis import strategies as st

from helena_cli.documents.debounce import Debouncer

#: What happens: a time that passes, and a key that is offered then.
STEPS = st.lists(
    st.tuples(st.integers(min_value=0, max_value=40), st.sampled_from("abcd")), max_size=80
)
TIMES = st.integers(min_value=0, max_value=50)


@given(steps=STEPS, quiet=TIMES, max_wait=TIMES)
def test_each_key_comes_in_time_and_not_before_its_time(
    steps: list[tuple[int, str]], quiet: int, max_wait: int
):
    waiting: Debouncer[str] = Debouncer(quiet=quiet, max_wait=max_wait)
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    now = 0

    def take() -> None:
        for key in waiting.take(now):
            assert key in first, "taken twice, or never offered"
            assert now >= last[key] + quiet or now >= first[key] + max_wait, "too early"
            del first[key], last[key]
        # Whoever is still there may wait.
        for key in first:
            assert now < last[key] + quiet and now < first[key] + max_wait, "too late"

    for pause, key in steps:
        for _ in range(pause):
            now += 1
            take()
        waiting.offer(key, now)
        first.setdefault(key, now)
        last[key] = now
        assert len(waiting) == len(first)

    # At the time that it names itself, there is something to take.
    while (due := waiting.next_due()) is not None:
        now = max(now, int(due))
        before = len(first)
        take()
        assert len(first) < before
    assert not first
