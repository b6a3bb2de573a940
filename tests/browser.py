"""A headless Chromium for tests, spoken to through a pipe in its own protocol (CDP): no other package is needed.

Tests that ask for it are skipped where no Chromium is installed. TENFOLD_CHROMIUM names one that is not on the path.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chromium-headless-shell")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-extensions"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
    *("--hide-scrollbars", "--remote-debugging-pipe"),
)
SECONDS = 90.0  # on a machine that does other things too


class Browser:
    """One page of a headless Chromium. ``problems`` are errors of its scripts and of its console, as they come."""

    def __init__(self, process: subprocess.Popen[bytes], send: int, receive: int) -> None:
        self.problems: list[str] = []
        self._process, self._send, self._receive = process, send, receive
        self._rest, self._number, self._session = b"", 0, ""
        self._events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **values: Any) -> dict[str, Any]:
        """Send a command and return its result; what happens meanwhile is kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": values}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self._number:
                assert "error" not in found, (method, found["error"])
                result: dict[str, Any] = found["result"]
                return result

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + SECONDS
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._receive], [], [], max(end - time.monotonic(), 0))
            chunk = os.read(self._receive, 1 << 20) if ready else b""
            if not chunk:
                msg = "Chromium said nothing more"
                raise TimeoutError(msg)
            self._rest += chunk
        text, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(text)
        self._note(found)
        return found

    def _note(self, found: dict[str, Any]) -> None:
        name, values = found.get("method", ""), found.get("params", {})
        self._events.append({"name": name, **values})
        if name == "Runtime.exceptionThrown":
            self.problems.append(str(values["exceptionDetails"].get("exception", values["exceptionDetails"])))
        elif name == "Runtime.consoleAPICalled" and values["type"] in {"error", "warning"}:
            self.problems.append(str(values["args"]))
        elif name == "Log.entryAdded" and values["entry"]["level"] in {"error", "warning"}:
            self.problems.append(values["entry"]["text"])

    def open(self, page: Path | str) -> None:
        """Open a file or an address and wait until it is loaded."""
        self._events.clear()
        self.ask("Page.navigate", url=page if isinstance(page, str) else page.absolute().as_uri())
        while not any(event["name"] == "Page.loadEventFired" for event in self._events):
            self._next()

    @property
    def requests(self) -> list[str]:
        """The addresses that the page asked for since it was opened."""
        sent = (event for event in self._events if event["name"] == "Network.requestWillBeSent")
        return [event["request"]["url"] for event in sent]

    def run(self, script: str) -> Any:
        """Return the value of an expression in the page."""
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def click(self, selector: str) -> None:
        """Click with the mouse in the middle of the first element that fits."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{element}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        box = self.run(f"{element}.getBoundingClientRect().toJSON()")
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str, text: str = "") -> None:
        """Press a key, where the focus is."""
        code = {"Enter": 13, "Tab": 9, "ArrowRight": 39, "ArrowLeft": 37, " ": 32}[key]
        values = {"key": key, "windowsVirtualKeyCode": code} | ({"text": text} if text else {})
        self.ask("Input.dispatchKeyEvent", type="keyDown", **values)
        self.ask("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def media(self, media: str = "", **features: str) -> None:
        """Pretend to be on paper (``print``), or that the system wishes for dark colours (``prefers_color_scheme``)."""
        wanted = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.ask("Emulation.setEmulatedMedia", media=media, features=wanted)

    def size(self, width: int, height: int = 900, *, mobile: bool = False) -> None:
        """Set the size of the window."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def wait(self, script: str) -> None:
        """Wait until an expression in the page is true."""
        end = time.monotonic() + SECONDS
        while not self.run(script):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.02)

    def picture(self, path: Path, *, whole: bool = True) -> None:
        """Write a PNG of the page."""
        found = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """Start a Chromium with an empty profile in the folder ``profile``; skip the test where there is none."""
    binary = os.environ.get("TENFOLD_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if binary is None:
        pytest.skip("no Chromium: install one, or name it in TENFOLD_CHROMIUM")
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    command = [binary, *FLAGS, f"--user-data-dir={profile}"]
    # It reads from file 3 and writes to file 4.
    shell = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
    with open(profile.with_suffix(".log"), "wb") as log:  # noqa: PTH123
        process = subprocess.Popen(
            ["/bin/bash", "-c", shell, "bash", *command], pass_fds=(theirs_in, theirs_out), stdout=log, stderr=log
        )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Browser(process, ours_out, ours_in)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(ours_out)
        os.close(ours_in)
