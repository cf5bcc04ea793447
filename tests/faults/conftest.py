"""How long the fault tests go on, and the seed of what they do.

`python -m pytest tests/faults --minutes 10 --seed 4711` is the long form; CI runs the short one.
"""

import random
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import pytest

#: The short form: each test still does everything it is for at least once.
SHORT = 0.06
SHORT_SEED = 4711

HERE = Path(__file__).parent
SEED = pytest.StashKey[int]()
FIGURES = pytest.StashKey[Counter[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Also registered when the whole suite runs, where this file is found too late to be asked."""
    group = parser.getgroup("faults")
    group.addoption("--minutes", type=float, default=SHORT, help="minutes for each endless test")
    group.addoption("--seed", type=int, default=None, help="repeats what a run with it did")


def pytest_report_header(config: pytest.Config) -> str:
    """What to say to have the same again."""
    return f"faults: --minutes {_minutes(config):g} --seed {_seed(config)}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A long form needs longer than other tests may take."""
    for item in items:
        if item.path.is_relative_to(HERE) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(180 + 120 * _minutes(config)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure says how it can be had again."""
    report = yield
    if report.failed and item.path.is_relative_to(HERE):
        report.sections.append(("faults", f"--seed {_seed(item.config)}"))
    return report


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """What was survived, in numbers."""
    figures = config.stash.get(FIGURES, Counter())
    totals: Counter[str] = Counter()
    for name, count in figures.items():
        totals[name.partition(": ")[0]] += count
    for total, count in sorted(totals.items()):
        parts = [name for name in sorted(figures) if name.startswith(f"{total}: ")]
        of_these = ", ".join(f"{figures[name]:,} {name.partition(': ')[2]}" for name in parts)
        terminalreporter.write_line(
            f"faults: {total}: {count:,}" + (f" ({of_these})" if of_these else "")
        )
    if totals["operations checked"] and not terminalreporter.getreports("failed"):
        terminalreporter.write_line("faults: lost: 0, doubled: 0")


@pytest.fixture(scope="session")
def minutes(pytestconfig: pytest.Config) -> float:
    """How long an endless test goes on."""
    return _minutes(pytestconfig)


@pytest.fixture(scope="session")
def seed(pytestconfig: pytest.Config) -> int:
    """For `random.Random(seed)`: the same seed makes the same decisions."""
    return _seed(pytestconfig)


@pytest.fixture(scope="session")
def figures(pytestconfig: pytest.Config) -> Counter[str]:
    """What a test survived or checked, as "total: part"; shown at the end."""
    return pytestconfig.stash.setdefault(FIGURES, Counter())


def _minutes(config: pytest.Config) -> float:
    return float(config.getoption("--minutes", default=SHORT))


def _seed(config: pytest.Config) -> int:
    if SEED not in config.stash:
        chance = random.SystemRandom().randrange(2**32)
        given = config.getoption("--seed", default=None)
        # The short form is the same every time; whoever has the time for more tries something new.
        usual = SHORT_SEED if _minutes(config) <= SHORT else chance
        config.stash[SEED] = usual if given is None else given
    return config.stash[SEED]
