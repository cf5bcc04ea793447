"""The metrics port against clients that mean no good. Real sockets on loopback."""

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest

from helena_cli.errors import HelenaError
from helena_cli.host import http
from helena_cli.host.http import HttpServer
from helena_cli.host.request import Answer, Refused, is_ours, parse
from tests.hosts import wait_until

HELLO = b"hello\n"


def broken() -> Answer:
    raise ZeroDivisionError("the password is hunter2")


ROUTES: dict[str, Callable[[], Answer]] = {"/": lambda: Answer(HELLO), "/broken": broken}


@pytest.fixture
def server() -> Iterator[HttpServer]:
    with closing(HttpServer(ROUTES, host="127.0.0.1", port=0)) as server:
        yield server


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody wants to wait for the real ones."""
    monkeypatch.setattr(http, "PATIENCE", 0.3)
    monkeypatch.setattr(http, "FAREWELL", 0.3)


def connect(server: HttpServer) -> socket.socket:
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), timeout=20)


def send(server: HttpServer, request: bytes) -> bytes:
    """The whole answer to some bytes."""
    with connect(server) as connection:
        connection.sendall(request)
        return receive(connection)


def receive(connection: socket.socket) -> bytes:
    answer = b""
    while chunk := connection.recv(65_536):
        answer += chunk
    return answer


def ask(
    server: HttpServer, path: str = "/", *, method: str = "GET", headers: Sequence[str] = ()
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of a well-formed request."""
    lines = [f"{method} {path} HTTP/1.1", *(headers or ["Host: localhost"]), "", ""]
    return split(send(server, "\r\n".join(lines).encode()))


def split(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    line, *fields = head.decode().split("\r\n")
    return int(line.split()[1]), dict(field.split(": ", 1) for field in fields), body


def is_alive(server: HttpServer) -> bool:
    return ask(server)[2] == HELLO


# What is answered


def test_get_brings_the_answer_and_head_the_same_without_body(server: HttpServer):
    status, headers, body = ask(server)
    assert (status, body) == (200, HELLO)
    head_status, head_headers, head_body = ask(server, method="HEAD")
    del headers["Date"], head_headers["Date"]
    assert (head_status, head_headers, head_body) == (200, headers, b"")
    assert headers["Content-Length"] == "6"


def test_no_answer_may_be_kept_guessed_framed_or_read_by_pages_from_elsewhere(server: HttpServer):
    for path in ("/", "/absent", "/broken"):
        _, headers, _ = ask(server, path)
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert not [name for name in headers if name.startswith("Access-Control")]
        assert "Server" not in headers


@pytest.mark.parametrize(
    "method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "get", "FETCH"]
)
def test_everything_but_reading_is_refused(server: HttpServer, method: str):
    status, headers, _ = ask(server, method=method)
    assert (status, headers["Allow"]) == (405, "GET, HEAD")
    assert is_alive(server)


def test_path_that_is_not_there_says_what_is(server: HttpServer):
    for path in ("/absent", "/..", "//", "/%2e%2e/etc/passwd", "/metrics/../"):
        status, _, body = ask(server, path)
        assert status == 404
        assert b"/broken" in body


def test_query_does_not_matter(server: HttpServer):
    assert ask(server, "/?a=b")[2] == HELLO


def test_client_that_goes_on_sending_is_heard_out(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(http, "FAREWELL", 30.0)
    with connect(server) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n")
        assert split(receive(connection))[2] == HELLO
        # A reset would be an error here, and could have overtaken the answer. Slowly, so that it
        # has the time to come.
        for _ in range(50):
            connection.sendall(b"x" * 2000)
            time.sleep(0.002)


def test_answer_that_fails_is_a_bug_that_tells_nothing_to_the_client(
    server: HttpServer, caplog: pytest.LogCaptureFixture
):
    status, _, body = ask(server, "/broken")
    assert status == 500
    assert b"hunter2" not in body
    assert "GET /broken failed" in caplog.text
    assert is_alive(server)


# Requests that are none


@pytest.mark.parametrize(
    "request_line",
    [
        b"",
        b"GET",
        b"GET /",
        b"GET / HTTP/0.9",
        b"GET / HTTP/2.0",
        b"GET  / HTTP/1.1",
        b"GET http://localhost/ HTTP/1.1",
        b"GET \xff HTTP/1.1",
        b"GET /\x00 HTTP/1.1",
        b"\x16\x03\x01\x02\x00\x01",
        b"GET / HTTP/1.1\nHost: localhost",
    ],
)
def test_request_line_that_cannot_be_understood_is_refused(server: HttpServer, request_line: bytes):
    assert split(send(server, request_line + b"\r\nHost: localhost\r\n\r\n"))[0] == 400
    assert is_alive(server)


@pytest.mark.parametrize(
    "headers",
    [
        ["Host: localhost", "Host: localhost"],
        ["Host: localhost", "host: evil.example"],
        ["Host: localhost", " folded"],
        ["Host : localhost"],
        ["Host"],
        ["Host: a b"],
        ["Host: user@localhost"],
        ["Host: localhost:99999999"],
        ["Host:"],
    ],
)
def test_headers_that_can_be_read_in_two_ways_are_refused(server: HttpServer, headers: list[str]):
    assert ask(server, headers=headers)[0] == 400


def test_huge_request_is_refused_without_being_read(server: HttpServer):
    for request in (
        b"GET /" + b"a" * 3_000_000,
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 500_000,
        b"GET / HTTP/1.1\r\nCookie: " + b"a" * 3_000_000,
    ):
        with connect(server) as connection:
            refused = threading.Event()
            thread = threading.Thread(target=_pour, args=(connection, request, refused))
            thread.start()
            # The answer comes although the request has not ended.
            assert connection.recv(65_536).startswith(b"HTTP/1.1 431 ")
            refused.set()
            thread.join()
        assert is_alive(server)


def _pour(connection: socket.socket, request: bytes, refused: threading.Event) -> None:
    while not refused.is_set():
        try:
            connection.sendall(request[:4096])
        except OSError:
            return
        request = request[4096:] or b"a" * 4096


def test_whatever_bytes_come_the_next_client_is_served(server: HttpServer):
    for noise in (b"\x00" * 100, b"\r\n\r\n", b"\n\n\n\n", "GET /☃ HTTP/1.1\r\n\r\n".encode()):
        with connect(server) as connection:
            connection.sendall(noise)
            connection.shutdown(socket.SHUT_WR)
            receive(connection)
    assert is_alive(server)


# The Host


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LOCALHOST", "localhost.", "localhost:1", "127.0.0.1", "127.0.0.1:8080"),
        *("127.8.9.10", "[::1]", "[::1]:9000"),
    ],
)
def test_loopback_may_be_called_by_all_its_names(server: HttpServer, host: str):
    assert ask(server, headers=[f"Host: {host}"])[2] == HELLO


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "evil.example:8080"),
        *("192.0.2.1", "[2001:db8::1]", "0.0.0.0", "2130706433", "0x7f.1", "localhost.evil"),
    ],
)
def test_name_of_another_site_that_resolves_to_loopback_is_refused(server: HttpServer, host: str):
    for path, method in (("/", "GET"), ("/", "HEAD"), ("/absent", "GET"), ("/", "POST")):
        status, _, body = ask(server, path, method=method, headers=[f"Host: {host}"])
        assert status == 421
        assert HELLO not in body


def test_old_client_without_a_host_is_served(server: HttpServer):
    assert split(send(server, b"GET / HTTP/1.0\r\n\r\n"))[2] == HELLO


def test_server_for_other_hosts_goes_by_its_addresses_and_its_configured_name():
    assert is_ours("metrics.example", "metrics.example")
    assert is_ours("metrics.example", "Metrics.Example")
    assert is_ours("192.0.2.1", "0.0.0.0")
    assert is_ours("2001:db8::1", "::")
    assert is_ours(socket.gethostname().lower(), "0.0.0.0")
    assert not is_ours("evil.example", "0.0.0.0")
    assert not is_ours("evil.example", "metrics.example")
    assert not is_ours("192.0.2.1", "127.0.0.1")
    assert not is_ours("192.0.2.1", "localhost")


def test_no_bytes_make_the_parser_fail_in_any_other_way():
    from hypothesis import given
    from hypothesis import strategies as st

    pieces = st.sampled_from([b"GET", b" ", b"/", b"HTTP/1.1", b"\r\n", b"Host:", b"[", b"]", b":"])

    @given(st.one_of(st.binary(max_size=200), st.lists(pieces, max_size=20).map(b"".join)))
    def check(head: bytes) -> None:
        try:
            request = parse(head)
        except Refused as refused:
            assert refused.answer.status == 400
        else:
            assert request.path.startswith("/")

    check()


# Clients that do not end


@pytest.mark.usefixtures("patience")
def test_request_that_does_not_arrive_in_time_is_given_up(server: HttpServer):
    with connect(server) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")
        assert split(receive(connection))[0] == 408


@pytest.mark.usefixtures("patience")
def test_byte_now_and_then_does_not_buy_more_time(server: HttpServer):
    with connect(server) as connection:
        ended = threading.Event()

        def trickle() -> None:
            while not ended.wait(0.05):
                try:
                    connection.sendall(b"a")
                except OSError:
                    return

        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            connection.sendall(b"GET /")
            assert connection.recv(65_536).startswith(b"HTTP/1.1 408 ")
        finally:
            ended.set()
            thread.join()


def test_clients_that_say_nothing_leave_room_for_the_others(server: HttpServer):
    with ExitStack() as stack:
        silent = [stack.enter_context(connect(server)) for _ in range(http.PLACES * 3)]
        # It is let in after them, unless those who have to go have not left yet.
        with suppress(ConnectionResetError, IndexError):
            ask(server)
        wait_until(lambda: _answers() <= http.PLACES, "they have left")
        for _ in range(5):
            assert is_alive(server)
        # Those that came first had to go.
        assert silent[0].recv(1) == b""


def test_each_who_comes_to_full_places_has_another_one_go():
    gate, here = threading.Event(), threading.Semaphore(0)

    def wait() -> Answer:
        here.release()
        gate.wait(30)
        return Answer(HELLO)

    with closing(HttpServer({"/": wait}, host="127.0.0.1", port=0)) as server, ExitStack() as stack:
        # Those who wait for an answer cannot leave yet.
        first = [stack.enter_context(connect(server)) for _ in range(http.PLACES)]
        for client in first:
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert here.acquire(timeout=20)
        for _ in range(5):
            stack.enter_context(connect(server))
        assert [client.recv(1) for client in first[:5]] == [b""] * 5
        gate.set()
        assert first[5].recv(8) == b"HTTP/1.1"


def test_threads_are_bounded_while_answers_have_to_wait():
    gate, here = threading.Event(), threading.Semaphore(0)

    def wait() -> Answer:
        here.release()
        gate.wait(30)
        return Answer(HELLO)

    with closing(HttpServer({"/": wait}, host="127.0.0.1", port=0)) as server, ExitStack() as stack:
        for _ in range(2 * http.PLACES):
            client = stack.enter_context(connect(server))
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            # Whoever waits for an answer cannot leave.
            assert here.acquire(timeout=20)
        # All beyond the bound are turned away.
        for _ in range(http.PLACES):
            with connect(server) as client, suppress(ConnectionResetError):
                assert client.recv(1) == b""
        names = [thread.name for thread in threading.enumerate()]
        assert names.count("helena-http-answer") <= 2 * http.PLACES
        gate.set()
        wait_until(lambda: _answers() == 0, "all have been answered")
        assert is_alive(server)


def _answers() -> int:
    return [thread.name for thread in threading.enumerate()].count("helena-http-answer")


def test_client_that_does_not_read_does_not_hold_up_another(patience: None):
    large = {"/": lambda: Answer(HELLO), "/large": lambda: Answer(b"x" * 50_000_000)}
    with closing(HttpServer(large, host="127.0.0.1", port=0)) as server, connect(server) as client:
        client.sendall(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert is_alive(server)
        wait_until(lambda: _answers() == 0, "it is given up")


# Starting and stopping


def test_taken_port_is_an_error_with_a_remedy(server: HttpServer):
    port = int(server.url.rpartition(":")[2])
    with pytest.raises(HelenaError) as caught:
        HttpServer(ROUTES, host="127.0.0.1", port=port)
    assert str(port) in str(caught.value)
    assert "[metrics] port" in caught.value.remedy
    assert is_alive(server)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1", "a" * 300, ".."])
def test_host_that_is_not_here_is_an_error_with_a_remedy(host: str):
    with pytest.raises(HelenaError) as caught:
        HttpServer(ROUTES, host=host, port=0)
    assert "[metrics]" in caught.value.remedy


def test_port_is_free_again_after_the_end(server: HttpServer):
    port = int(server.url.rpartition(":")[2])
    assert is_alive(server)
    server.close()
    with closing(HttpServer(ROUTES, host="127.0.0.1", port=port)) as again:
        assert is_alive(again)


def test_end_does_not_wait_for_a_silent_client(server: HttpServer):
    with connect(server) as connection:
        wait_until(lambda: _answers() == 1, "it is let in")
        server.close()
        assert connection.recv(1) == b""
    assert _answers() == 0


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="There is no IPv6 here.")
def test_ipv6_works_and_its_url_can_be_opened():
    with closing(HttpServer(ROUTES, host="::1", port=0)) as server:
        assert server.url.startswith("http://[::1]:")
        assert ask(server, headers=["Host: [::1]:1"])[2] == HELLO


def test_client_that_leaves_in_the_middle_is_no_news(
    server: HttpServer, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO, logger="helena_cli"):
        for _ in range(20):
            connection = connect(server)
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            connection.close()
        wait_until(lambda: _answers() == 0, "all are gone")
    assert caplog.text == ""
