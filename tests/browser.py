"""A headless Chromium, asked over the pipe that it offers for that: no library is needed."""

import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

#: Seconds for one answer: a busy machine starts a browser slowly.
PATIENCE = 60.0

OPTIONS = (
    "--headless",
    # Tests run as root in containers, where it cannot have its sandbox.
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--remote-debugging-pipe",
)


def program() -> str | None:
    """Where Chromium is, if it is installed."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


class Browser:
    """A started browser with a profile of its own in `folder`. A context manager."""

    def __init__(self, folder: Path) -> None:
        chromium = program()
        assert chromium is not None
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # It reads from descriptor 3 and writes to 4.
        command = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, "bash", chromium, *OPTIONS, f"--user-data-dir={folder}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(theirs_in, theirs_out),
            env={"PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8"},
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._unread = b""
        self._calls = 0
        self._targets: list[str] = []
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.call("Browser.close")
            self._process.wait(PATIENCE)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._out)
            os.close(self._in)

    def call(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        """Ask for something and return the answer; what happens meanwhile goes to `events`."""
        self._calls += 1
        message: dict[str, Any] = {"id": self._calls, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == self._calls:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _receive(self, deadline: float) -> Any:
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the browser does not answer"
            chunk = os.read(self._in, 65536)
            assert chunk, "the browser is gone"
            self._unread += chunk
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)

    def open(self, url: str, *, width: int = 1200, dark: bool = False) -> "Page":
        """A new page with this window width, in light or dark."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._targets.append(target)
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        page.show(url, width=width, dark=dark)
        return page

    def close_pages(self) -> None:
        """Close all pages, and forget what happened in them."""
        while self._targets:
            self.call("Target.closeTarget", targetId=self._targets.pop())
        self.events.clear()


class Page:
    """One open page, what it asked the network for, and what it complained of."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session

    def show(self, url: str, *, width: int, dark: bool) -> None:
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.navigate", url=url)

    def call(self, method: str, **parameters: Any) -> Any:
        return self._browser.call(method, self._session, **parameters)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def text(self, identifier: str) -> str:
        """What an element shows; empty while it is not there or hidden."""
        element = f"document.getElementById({json.dumps(identifier)})"
        return str(self.evaluate(f"({element}?.checkVisibility() && {element}.innerText) || ''"))

    def attribute(self, selector: str, name: str) -> str:
        """An attribute of the first element that a selector finds."""
        found = f"document.querySelector({json.dumps(selector)}).getAttribute({json.dumps(name)})"
        return str(self.evaluate(found))

    def requests(self) -> list[str]:
        """The URLs that it asked for."""
        return [event["request"]["url"] for event in self._events("Network.requestWillBeSent")]

    def complaints(self) -> list[str]:
        """Uncaught errors, and what stands in the console."""
        thrown = self._events("Runtime.exceptionThrown")
        logged = [event["entry"] for event in self._events("Log.entryAdded")]
        called = self._events("Runtime.consoleAPICalled")
        return [json.dumps(found) for found in (*thrown, *logged, *called)]

    def _events(self, method: str) -> list[dict[str, Any]]:
        # A call, so that everything that happened before it has arrived.
        self.evaluate("0")
        return [
            event["params"]
            for event in self._browser.events
            if event["method"] == method and event.get("sessionId") == self._session
        ]
