"""What the metrics port tells: the same as `helena status`, to anybody, and nothing secret."""

import base64
import hashlib
import http.client
import json
import logging
import math
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from prometheus_client.parser import text_string_to_metric_families
from psycopg.conninfo import make_conninfo

from helena_cli.batch.ledger import FlushRecord
from helena_cli.batch.verdict import Verdict
from helena_cli.errors import HelenaError
from helena_cli.host.metrics import MetricsServer, discreet
from helena_cli.runtime import Runtime
from tests.commands import Program
from tests.hosts import Host, wait_until

pytestmark = pytest.mark.postgres

NEVER = {"HELENA_BATCH_INTERVAL": "3600", "HELENA_BATCH_SIZE": "5000"}
PATHS = ("/", "/batch/metrics", "/metrics", "/healthz")

Serve = Callable[..., "Client"]


class Client:
    """Asks one server."""

    def __init__(self, url: str) -> None:
        self.netloc = urlsplit(url).netloc

    def get(self, path: str) -> tuple[int, dict[str, str], str]:
        connection = http.client.HTTPConnection(self.netloc, timeout=30)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read().decode()
        finally:
            connection.close()

    def json(self) -> Any:
        status, headers, body = self.get("/batch/metrics")
        assert (status, headers["Content-Type"]) == (200, "application/json")
        return json.loads(body)

    def samples(self) -> dict[str, float]:
        """Each sample of /metrics by its name with labels."""
        status, headers, body = self.get("/metrics")
        assert (status, headers["Content-Type"].split(";")[0]) == (200, "text/plain")
        return {
            sample.name + "".join(f"[{value}]" for value in sample.labels.values()): sample.value
            for family in text_string_to_metric_families(body)
            for sample in family.samples
        }


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server for the spool of a runtime."""
    with ExitStack() as stack:

        def start(runtime: Runtime, health: Callable[[], str | None] = lambda: None) -> Client:
            server = MetricsServer(
                runtime.spool,
                host="127.0.0.1",
                port=0,
                flusher_running=runtime.flusher_running,
                health=health,
            )
            stack.callback(server.stop)
            return Client(server.start())

        yield start


def add(runtime: Runtime, count: int) -> None:
    runtime.engine.add_operations(("insert", "numbers", {"n": n}) for n in range(count))


def spoil(runtime: Runtime) -> None:
    """Operations that become dead letters, one of which is dropped."""
    spool = runtime.spool
    ids = spool.extend(("insert", "numbers", {"n": n}) for n in range(3))
    spool.bury([Verdict(identifier, "22003", "out of range") for identifier in ids])
    spool.drop(ids[:1])


# The same numbers for everybody


def test_json_has_what_status_has_and_the_law(host: Host, tmp_path: Path, serve: Serve):
    program = Program(tmp_path, host.state_dir, host.variables["HELENA_DSN"])
    with host.runtime(**NEVER) as runtime:
        spoil(runtime)
        add(runtime, 20)
        assert runtime.engine.flush(60)
        add(runtime, 5)
        told, status = serve(runtime).json(), program.json("status")
    assert list(told) == ["queue", "flusher", "flushes", "waiting_tables", "conservation"]
    # They move by themselves.
    for document in (told, status):
        assert document["queue"].pop("oldest_seconds") > 0
        assert document["queue"].pop("spool_bytes") > 0
        assert document["flusher"].pop("heartbeat")
    assert (
        told["queue"]
        == status["queue"]
        == {**{"insert": 5, "update": 0, "message": 0, "total": 5, "dead_letters": 2, "lost": 0}}
    )
    assert told["flusher"] == status["flusher"]
    assert told["flushes"] == status["flushes"]
    assert told["flusher"]["running"]
    assert told["flushes"]["last"]["operations"] == 20
    assert told["waiting_tables"] == 0
    assert told["conservation"] == {
        **{"accepted": 28, "written": 20, "coalesced": 0, "dead": 2, "dropped": 1, "spooled": 5}
    }


def test_new_spool_has_the_same_keys(host: Host, serve: Serve):
    with host.runtime() as runtime:
        client = serve(runtime)
        told = client.json()
        assert told["flusher"] == {"running": False, "pid": None, "since": None, "heartbeat": None}
        assert told["flushes"]["last"] is None
        assert client.samples()["helena_operations_accepted_total"] == 0


def test_prometheus_gets_the_numbers_of_the_spool(host: Host, serve: Serve):
    with host.runtime(**NEVER) as runtime:
        spoil(runtime)
        add(runtime, 20)
        assert runtime.engine.flush(60)
        add(runtime, 5)
        client = serve(runtime)
        samples, told = client.samples(), client.json()
    assert samples["helena_operations_accepted_total"] == 28
    assert samples["helena_operations_written_total"] == 20
    assert samples["helena_operations_dropped_total"] == 1
    assert samples["helena_dead_letters"] == 2
    assert samples["helena_queue_operations[insert]"] == 5
    assert samples["helena_queue_operations[message]"] == 0
    assert samples["helena_queue_oldest_seconds"] > 0
    assert samples["helena_flushes_total"] == told["flushes"]["count"] >= 1
    assert samples["helena_flush_rows_total"] == 20
    assert samples["helena_flusher_running"] == samples["helena_healthy"] == 1
    assert samples["helena_last_flush_success"] == 1
    assert samples["helena_flush_seconds_count"] == told["flushes"]["count"]
    assert samples["helena_flush_seconds_sum"] > 0
    assert samples["helena_commit_delay_seconds_count"] == 20
    assert samples["helena_commit_delay_seconds_bucket[+Inf]"] == 20
    assert 0 < samples["helena_commit_delay_seconds_sum"] < 20 * 60


def test_names_and_types_follow_the_conventions(host: Host, serve: Serve):
    with host.runtime() as runtime:
        add(runtime, 1)
        assert runtime.engine.flush(60)
        text = serve(runtime).get("/metrics")[2]
    for family in text_string_to_metric_families(text):
        assert family.documentation.endswith("."), family.name
        if family.name.startswith("process_"):
            continue
        assert re.fullmatch(r"helena_[a-z]+(_[a-z]+)*", family.name)
        if family.type == "counter":
            assert all(sample.name.endswith("_total") for sample in family.samples)
        if family.type == "histogram":
            assert family.name.endswith("_seconds")
            buckets = [s for s in family.samples if s.name.endswith("_bucket")]
            bounds = [float(s.labels["le"].replace("+Inf", "inf")) for s in buckets]
            assert bounds == sorted(bounds)
            assert bounds[-1] == math.inf
            assert [s.value for s in buckets] == sorted(s.value for s in buckets)


def test_law_holds_in_every_scrape_while_operations_come_and_go(host: Host, serve: Serve):
    with host.runtime(HELENA_BATCH_INTERVAL="0.02") as runtime:
        client = serve(runtime)
        stop = threading.Event()

        def produce() -> None:
            n = 0
            while not stop.is_set():
                # Every seventh is refused.
                value = n if n % 7 else "no number"
                runtime.engine.add_operation("insert", "numbers", {"n": value})
                n += 1

        producer = threading.Thread(target=produce)
        producer.start()
        try:
            seen = [assert_law(client) for _ in range(30)]
            wait_until(lambda: assert_law(client) > seen[0], "operations come")
        finally:
            stop.set()
            producer.join()
    assert seen == sorted(seen)


def assert_law(client: Client) -> float:
    found = client.samples()
    accepted = found["helena_operations_accepted_total"]
    assert accepted == (
        sum(
            found[f"helena_operations_{name}_total"] for name in ("written", "coalesced", "dropped")
        )
        + found["helena_dead_letters"]
        + sum(found[f"helena_queue_operations[{kind}]"] for kind in ("insert", "update", "message"))
    )
    law = client.json()["conservation"]
    assert law.pop("accepted") == sum(law.values())
    return accepted


def test_flushes_of_another_process_are_told_too(host: Host, serve: Serve):
    with host.runtime() as runtime:
        client = serve(runtime)
        result = host.run(
            "from helena_cli import add_operation\nadd_operation('insert', 'numbers', {'n': 0})\n"
        )
        assert result.returncode == 0, result.stderr
        samples = client.samples()
        assert samples["helena_commit_delay_seconds_count"] == 1
        assert samples["helena_flusher_running"] == 0


def test_client_library_of_prometheus_is_loaded_for_those_whom_prometheus_asks_only(host: Host):
    result = host.run(
        "import sys\n"
        "import helena_cli.cli, helena_cli.host.metrics\n"
        "assert 'prometheus_client' not in sys.modules\n"
    )
    assert result.returncode == 0, result.stderr


# Health


def test_health_is_ok_or_the_reason(host: Host, serve: Serve):
    reasons: list[str | None] = [None, "the watcher has not turned for 93 s"]
    with host.runtime() as runtime:
        client = serve(runtime, health=lambda: reasons[0])
        status, _, body = client.get("/healthz")
        assert (status, body) == (200, "ok\n")
        reasons.reverse()
        status, _, body = client.get("/healthz")
        assert (status, body) == (503, "the watcher has not turned for 93 s\n")
        assert client.samples()["helena_healthy"] == 0


def test_spool_that_cannot_be_read_is_told_without_its_place(
    host: Host, serve: Serve, caplog: pytest.LogCaptureFixture
):
    with host.runtime() as runtime:
        client = serve(runtime)
        path = runtime.spool.path
        aside = path.with_suffix(".aside")
        path.rename(aside)
        path.mkdir()
        for name in ("/batch/metrics", "/metrics"):
            status, _, body = client.get(name)
            assert (status, body) == (
                503,
                "The queue cannot be read at the moment; the log of Helena says why.\n",
            )
        assert str(path) in caplog.text
        assert client.get("/healthz")[0] == 200
        path.rmdir()
        aside.rename(path)
        assert client.get("/metrics")[0] == 200


# The page


def test_browser_is_told_to_run_the_script_of_the_page_and_nothing_else(host: Host, serve: Serve):
    with host.runtime() as runtime:
        status, headers, page = serve(runtime).get("/")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    policy = dict(rule.split(" ", 1) for rule in headers["Content-Security-Policy"].split("; "))
    for kind in ("script", "style"):
        texts = re.findall(f"<{kind}[^>]*>(.*?)</{kind}>", page, flags=re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in texts]
        assert policy.pop(f"{kind}-src") == " ".join(f"'sha256-{text}'" for text in hashes)
    assert policy == {
        "default-src": "'none'",
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    # No hash would let these pass.
    assert not re.search(r"<[^>]+\s(style|on[a-z]+)=", page)


# Nothing secret


def test_nothing_secret_is_in_any_answer(
    host: Host, serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    secret = "tulip-in-the-snow"
    away = make_conninfo(host="127.0.0.1", port=1, user="ann", password=secret, dbname="ledger")
    caplog.set_level(logging.DEBUG, logger="helena_cli")
    with host.runtime(HELENA_DSN=away, HELENA_BATCH_SHUTDOWN_TIMEOUT="0") as runtime:
        client = serve(runtime, health=lambda: f"{tmp_path}/docs is away, and so is {away}")
        add(runtime, 1)
        wait_until(lambda: client.json()["flushes"]["last"], "a flush has failed")
        answers = [client.get("/batch/metrics")]
        error = f"postgresql://ann:{secret}@db/ledger: {runtime.spool.path} did not answer"
        runtime.spool.record(FlushRecord(1.0, 0, 0, 0.1, error))
        answers += [client.get(path) for path in (*PATHS, "/absent", f"/?{secret}")]
    told = "".join(f"{headers}{body}" for _, headers, body in answers)
    assert "did not answer" in told
    assert "is away, and so is" in told
    for word in (secret, str(host.state_dir), str(tmp_path), "ledger"):
        assert word not in told
    assert secret not in caplog.text


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("The queue /home/ann/x.spool did not answer: busy.", "The queue … did not answer: busy."),
        ("no server at postgresql://ann:pw@db:5432/x?a=b now", "no server at … now"),
        ("host=db password='a b' user=ann", "host=… password=… user=…"),
        ("The database ann@db:5432/x cannot be reached", "The database … cannot be reached"),
        ("sslpassword = pw", "sslpassword = …"),
        ('on socket "/run/my db/.s.PGSQL.5432" failed', "on socket … failed"),
        ("~/.pgpass is missing", "… is missing"),
        ("(/etc/helena.toml)", "(…)"),
        ("4,327 operations/s and 1/2", "4,327 operations/s and 1/2"),
        ("password authentication failed", "password authentication failed"),
    ],
)
def test_messages_lose_places_and_passwords_and_nothing_else(message: str, told: str):
    assert discreet(message) == told


# Starting and stopping


def test_taken_port_is_an_error_that_leaves_the_first_server_alone(host: Host, serve: Serve):
    with host.runtime() as runtime:
        client = serve(runtime)
        port = int(client.netloc.rpartition(":")[2])
        second = MetricsServer(
            runtime.spool,
            host="127.0.0.1",
            port=port,
            flusher_running=runtime.flusher_running,
            health=lambda: None,
        )
        with pytest.raises(HelenaError) as caught:
            second.start()
        assert str(port) in str(caught.value)
        assert caught.value.remedy
        second.stop()
        assert client.get("/healthz")[0] == 200


def test_server_that_was_stopped_can_be_started_again(host: Host):
    with host.runtime() as runtime:
        server = MetricsServer(
            runtime.spool,
            host="localhost",
            port=0,
            flusher_running=runtime.flusher_running,
            health=lambda: None,
        )
        for _ in range(2):
            url = server.start()
            assert url.startswith("http://localhost:")
            assert Client(url).get("/healthz")[0] == 200
            server.stop()
        with pytest.raises(OSError):
            Client(url).get("/healthz")
