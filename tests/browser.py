"""A headless Chromium for tests of pages, driven through its DevTools protocol over two pipes; it needs no library."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
_FLAGS = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update "
    "disable-sync disable-dev-shm-usage remote-debugging-pipe"
)
_SECONDS = 60


class Browser:
    """One page. What it logs, exceptions and refused content included, is in `messages`; `requests`: what it loads."""

    def __init__(self, profile: Path) -> None:
        """`profile`: a new folder for what the browser writes."""
        assert CHROMIUM is not None
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        # It reads file descriptor 3 and writes 4. By way of 10 and up, as one of ours may be one of these two.
        shell = 'exec 10<&"$1" 11>&"$2"; shift 2; exec 3<&10 4>&11 10<&- 11>&-; exec "$@"'
        flags = [f"--{flag}" for flag in (*_FLAGS.split(), f"user-data-dir={profile}")]
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "bash", str(to_read), str(to_write), CHROMIUM, *flags],
            pass_fds=(to_read, to_write),
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._received, self._number, self._session = b"", 0, ""
        self.messages: list[str] = []
        self.requests: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": params}
        if self._session:
            command["sessionId"] = self._session
        os.write(self._to, json.dumps(command).encode() + b"\0")
        while (message := self._receive()).get("id") != self._number:
            pass
        assert "error" not in message, message
        return message["result"]

    def open(self, path: Path) -> None:
        """Waits until all of the page is loaded."""
        assert "errorText" not in self.send("Page.navigate", url=path.resolve().as_uri()), path
        while self._receive().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, expression: str) -> Any:
        """The value of JavaScript in the page."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def show_as(self, width: int, height: int = 900, scheme: str = "light") -> None:
        """A window of this size, for somebody who prefers this colour scheme."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self) -> bytes:
        """A PNG of the window."""
        return base64.b64decode(self.send("Page.captureScreenshot")["data"])

    def close(self) -> None:
        """Ends the browser."""
        os.close(self._to)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._from)

    def _receive(self) -> dict[str, Any]:
        """The next answer or event; an event is noted."""
        end = time.monotonic() + _SECONDS
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._from], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"the browser is silent for {_SECONDS} s"
            content = os.read(self._from, 1 << 20)
            assert content, "the browser has ended"
            self._received += content
        line, _, self._received = self._received.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        method = message.get("method")
        if method in (
            "Runtime.consoleAPICalled",
            "Runtime.exceptionThrown",
            "Log.entryAdded",
            "Page.javascriptDialogOpening",
        ):
            self.messages.append(json.dumps(message["params"]))
        if method == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        return message
