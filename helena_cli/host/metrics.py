"""What a running Helena tells over HTTP: a page, JSON, Prometheus' text and whether it is well.

Everybody on the machine may read it, so it holds numbers and no more: what messages say of
passwords and of places in the file system is left out.
"""

import json
import logging
import re
from base64 import b64encode
from collections.abc import Callable, Iterator
from functools import cached_property
from hashlib import sha256
from http import HTTPStatus
from importlib import metadata, resources
from typing import TYPE_CHECKING, Any

from msgspec import to_builtins

from helena_cli.batch import report
from helena_cli.batch.spool import Spool
from helena_cli.errors import HelenaError
from helena_cli.host.http import HttpServer
from helena_cli.host.request import Answer

# It is slow to import, and needed only by those whom Prometheus asks.
if TYPE_CHECKING:
    from prometheus_client.registry import CollectorRegistry

log = logging.getLogger(__name__)

#: The text format that every Prometheus reads.
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"

UNREADABLE = "The queue cannot be read at the moment; the log of Helena says why.\n"


class MetricsServer:
    """Answers on /, /batch/metrics, /metrics and /healthz. Safe for threads.

    `health` returns None when all is well, else the reason. The page may hold its own script and
    style in elements, but none in attributes: the browser is told what to run by hashes.
    """

    def __init__(
        self,
        spool: Spool,
        *,
        host: str,
        port: int,
        flusher_running: Callable[[], bool],
        health: Callable[[], str | None],
    ) -> None:
        self._spool = spool
        self._host = host
        self._port = port
        self._flusher_running = flusher_running
        self._health = health
        self._server: HttpServer | None = None

    def start(self) -> str:
        """Listen, and return the URL. Raises HelenaError when the port is taken."""
        routes = {
            "/": lambda: self._page,
            "/batch/metrics": lambda: self._of_spool(self._json),
            "/metrics": lambda: self._of_spool(self._prometheus),
            "/healthz": self._healthz,
        }
        self._server = HttpServer(routes, host=self._host, port=self._port)
        log.info("metrics are at %s", self._server.url)
        return self._server.url

    def stop(self) -> None:
        """Listen no longer."""
        if self._server is not None:
            self._server.close()
            self._server = None

    @cached_property
    def _page(self) -> Answer:
        page = resources.files("helena_cli.host").joinpath("page.html").read_bytes()
        allowed = "".join(
            f"; {kind}-src {' '.join(_hashes(page, kind))}" for kind in ("script", "style")
        )
        policy = (
            "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none';"
            f" form-action 'none'; frame-ancestors 'none'{allowed}"
        )
        return Answer(page, "text/html; charset=utf-8", headers={"Content-Security-Policy": policy})

    def _of_spool(self, tell: Callable[[], Answer]) -> Answer:
        try:
            return tell()
        except HelenaError as error:
            log.warning("the metrics cannot be told: %s", error)
            return Answer(UNREADABLE.encode(), status=HTTPStatus.SERVICE_UNAVAILABLE)

    def _json(self) -> Answer:
        found = self._spool.report()
        told = report.document(
            found.queue, found.lost, found.flusher, self._flusher_running(), found.flushes
        )
        last: dict[str, Any] | None = told["flushes"]["last"]
        if last is not None and last["error"] is not None:
            last["error"] = discreet(last["error"])
        told["waiting_tables"] = found.waiting
        told["conservation"] = to_builtins(found.conservation)
        return Answer(f"{json.dumps(told)}\n".encode(), "application/json")

    def _prometheus(self) -> Answer:
        from prometheus_client import generate_latest

        return Answer(generate_latest(self._registry), PROMETHEUS)

    @cached_property
    def _registry(self) -> "CollectorRegistry":
        from prometheus_client import CollectorRegistry, ProcessCollector

        from helena_cli.host.prometheus import Figures

        registry = CollectorRegistry()
        figures = Figures(self._spool.report, self._flusher_running, self._health, _version())
        registry.register(figures)
        # Memory, processor time and open files of this process.
        ProcessCollector(registry=registry)
        return registry

    def _healthz(self) -> Answer:
        reason = self._health()
        if reason is None:
            return Answer(b"ok\n")
        return Answer(f"{discreet(reason)}\n".encode(), status=HTTPStatus.SERVICE_UNAVAILABLE)


def _version() -> str:
    try:
        return metadata.version("helena-cli")
    except metadata.PackageNotFoundError:
        return "source"


def _hashes(page: bytes, kind: str) -> Iterator[str]:
    """What a Content-Security-Policy calls the scripts, or the styles, that stand in the page."""
    found = re.findall(rf"<{kind}>(.*?)</{kind}>".encode(), page, flags=re.DOTALL)
    if not found:
        yield "'none'"
    for text in found:
        yield f"'sha256-{b64encode(sha256(text).digest()).decode()}'"


#: How a connection string says where the database is, and who asks.
_PARAMETER = r"\b(\w*(?:password|secret)|user|host|hostaddr|port|dbname)(\s*=\s*)('[^']*'|\S+)"


def discreet(message: str) -> str:
    """A message without the places, the accounts and the passwords that it may name."""
    message = re.sub(_PARAMETER, r"\1\2…", message, flags=re.IGNORECASE)
    message = re.sub(r"\b\w+://\S+|(?<!\S)\S*@\S+", "…", message)
    # Quoted ones may hold spaces; of others the end cannot be told when they do.
    message = re.sub(r"""(["'])~?/.*?\1""", "…", message)
    return re.sub(r"""(?<![\w/])~?/[^\s:;,"')\]]+""", "…", message)
