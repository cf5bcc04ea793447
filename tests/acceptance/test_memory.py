"""The memory of the process that writes does not grow with the queue."""

import pytest

from tests.benchmarks import memory

pytestmark = [pytest.mark.acceptance, pytest.mark.postgres, pytest.mark.slow]


def test_peak_memory_does_not_depend_on_the_length_of_the_queue(postgres: str):
    short, long = memory.peak(postgres, 20_000), memory.peak(postgres, 200_000)
    # Of 180,000 more operations each would have to be kept: two or three times as much.
    assert long / short < 1.3, f"{short:.0f} MiB for a short queue, {long:.0f} MiB for a long one"
