"""The page at / in a real browser: its numbers are the spool's, and nothing else is loaded."""

import re
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from helena_cli.batch.flush import Waiting
from helena_cli.batch.ledger import Flusher, FlushRecord
from helena_cli.batch.spool import Spool
from helena_cli.batch.verdict import Verdict
from helena_cli.host.metrics import MetricsServer
from tests import browser
from tests.browser import Browser, Page
from tests.hosts import wait_until
from tests.spools import fill, ids, settle

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.skipif(browser.program() is None, reason="Chromium is not installed."),
]

PAGE = (Path(browser.__file__).parent.parent / "helena_cli/host/page.html").read_text("utf-8")


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture
def chromium(started: Browser) -> Iterator[Browser]:
    """The browser, without the pages of other tests."""
    yield started
    started.close_pages()


@pytest.fixture
def spool(state_dir: Path) -> Iterator[Spool]:
    """Every number of it is another one."""
    with closing(Spool.open(state_dir / "test.spool")) as spool:
        fill(spool, 1300)
        spool.extend(("update", "u", {"n": number}) for number in range(21))
        spool.extend(("message", "m", {"n": number}) for number in range(5))
        first = ids(spool)
        spool.bury([Verdict(number, "23505", "no") for number in first[:3]])
        spool.drop([first[0]])
        settle(spool, first[3:43], coalesced=first[43:50])
        spool.record(FlushRecord(1_700_000_000.0, 50, 40, 0.0123))
        yield spool


@pytest.fixture
def serve(spool: Spool) -> Iterator[Callable[[int], MetricsServer]]:
    """Starts a server at a port."""
    servers = []

    def start(port: int) -> MetricsServer:
        server = MetricsServer(
            spool, host="127.0.0.1", port=port, flusher_running=lambda: True, health=lambda: None
        )
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def url(serve: Callable[[int], MetricsServer]) -> str:
    return serve(0).start()


def shows(page: Page, identifier: str, text: str) -> None:
    """Wait until an element shows this."""
    wait_until(lambda: text in page.text(identifier), f"{identifier}: {text}")


def test_the_numbers_are_those_of_the_spool(chromium: Browser, spool: Spool, url: str):
    page = chromium.open(url)
    shows(page, "state", "live")
    law, queue = spool.conservation(), spool.queue()
    assert (queue.insert, queue.update, queue.message) == (1250, 21, 5)
    told = {
        "queue-total": f"{queue.total:,}",
        "queue-insert": "1,250",
        "queue-update": "21",
        "queue-message": "5",
        "law-accepted": "1,326",
        "law-written": "40",
        "law-coalesced": "7",
        "law-dead": "2",
        "law-dropped": "1",
        "law-spooled": f"{law.spooled:,}",
        "law": "The books agree: every accepted operation is accounted for.",
        "flush-time": "12.3 ms",
        "flush-p50": "12.3 ms",
        "flush-count": "1",
        "flush-failures": "0",
        "waiting-tables": "none",
        "dead-letters": "2: helena dead-letters list says why",
        "flusher": "running",
    }
    assert {identifier: page.text(identifier) for identifier in told} == told
    assert "50 operations, 40 rows, 12.3 ms" in page.text("last-flush")
    # It was long ago: its day is told, and it is no part of the last five minutes.
    assert page.text("last-flush").startswith("11/1")
    assert page.attribute("#flush-chart path", "d") == ""
    assert page.evaluate("document.title") == "Helena: 1,276 waiting"


def test_what_happens_afterwards_is_shown_without_a_reload(
    chromium: Browser, spool: Spool, url: str
):
    page = chromium.open(url)
    shows(page, "queue-total", "1,276")
    settle(spool, ids(spool)[:1000])
    spool.record(FlushRecord(1_700_000_100.0, 1000, 1000, 0.4567))
    spool.beat(Flusher(4711, "host", 1_700_000_000.0, 4e9))
    shows(page, "queue-total", "276")
    shows(page, "flush-time", "457 ms")
    shows(page, "flusher", "process 4711, since ")
    rate = int(page.text("rate").replace(",", ""))
    assert 0 < rate <= 1000
    assert page.attribute("#queue-chart", "aria-label") == (
        "Operations waiting: now 276, at most 1,276 in the last 5 minutes"
    )
    assert "at most 457 ms" in page.attribute("#flush-chart", "aria-label")
    for chart in ("queue", "rate", "flush"):
        assert page.attribute(f"#{chart}-chart path", "d").startswith("M")
    spool.wait("m", Waiting("no such table", "42P01"), 3600.0)
    shows(page, "waiting-tables", "1: helena status says why")
    spool.record(FlushRecord(1_700_000_200.0, 0, 0, 5.0, "no route to host."))
    shows(page, "last-flush", "failed: no route to host. What waits stays queued")
    assert page.text("flush-failures") == "1"
    assert page.text("flush-time") == "457 ms"


def test_it_asks_its_own_origin_only_and_complains_of_nothing(chromium: Browser, url: str):
    page = chromium.open(url)
    shows(page, "state", "live")
    wait_until(lambda: len(page.requests()) >= 3, "a second look at the numbers")
    assert set(page.requests()) == {f"{url}/", f"{url}/batch/metrics"}
    assert page.complaints() == []


def test_it_says_when_nobody_answers_any_more_and_goes_on_when_somebody_does(
    chromium: Browser, spool: Spool, serve: Callable[[int], MetricsServer]
):
    server = serve(0)
    url = server.start()
    page = chromium.open(url)
    shows(page, "state", "live")
    assert page.text("trouble") == ""
    server.stop()
    shows(page, "trouble", "Helena does not answer since ")
    assert "Does helena watch still run?" in page.text("trouble")
    assert page.text("state") == "Asking again …"
    assert page.text("queue-total") == "1,276"
    fill(spool, 1)
    serve(int(url.rpartition(":")[2])).start()
    shows(page, "queue-total", "1,277")
    assert page.text("trouble") == ""
    assert page.text("state") == "live"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1200])
def test_it_is_readable_on_a_phone_and_in_the_dark(
    chromium: Browser, url: str, width: int, dark: bool
):
    page = chromium.open(url, width=width, dark=dark)
    shows(page, "state", "live")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(*map(int, re.findall(r"\d+", back))) < 0.5) is dark


# The colours, by the formula of the Web Content Accessibility Guidelines


def luminance(*channels: float) -> float:
    shares = (channel / 255 for channel in channels[:3])
    red, green, blue = (s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    values = sorted(luminance(*bytes.fromhex(colour)) for colour in (one, other))
    return (values[1] + 0.05) / (values[0] + 0.05)


@pytest.mark.parametrize("scheme", [0, 1])
def test_its_colours_stand_out(scheme: int):
    block = re.findall(r":root \{(.*?)\}", PAGE, flags=re.DOTALL)[scheme]
    found = {
        name: value if len(value) == 6 else "".join(digit * 2 for digit in value)
        for name, value in re.findall(r"--([a-z]+): #([0-9a-f]{3,6});", block)
    }
    for back in ("back", "card"):
        for text in ("text", "soft", "good", "bad", "insert", "update", "message"):
            assert contrast(found[text], found[back]) >= 4.5, (text, back)
