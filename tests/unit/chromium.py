"""Headless Chromium for tests, driven by its DevTools protocol over a pipe: nothing to install, no port."""

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

PATH = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--remote-debugging-pipe",
)
TIMEOUT_S = 60.0
Json = dict[str, Any]


class Chromium:
    """One browser. Commands are answered in their order; what happens meanwhile is kept as events."""

    def __init__(self, folder: Path) -> None:
        """Start it; its profile and downloads go into `folder`."""
        self.downloads = folder / "downloads"
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        command = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'  # the protocol's two descriptors
        arguments = [str(PATH), *FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", command, *arguments],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer, self._number = b"", 0
        self.events: list[Json] = []
        behaviour = {"behavior": "allow", "downloadPath": str(self.downloads), "eventsEnabled": True}
        self.send("Browser.setDownloadBehavior", **behaviour)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)

    def send(self, method: str, session: str | None = None, **params: Any) -> Json:
        """One command and its answer; AssertionError if it is refused."""
        number = self._write(method, session, params)
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.events.append(answer)
            if answer.get("method") == "Page.javascriptDialogOpening":
                self._write("Page.handleJavaScriptDialog", answer["sessionId"], {"accept": False})  # it blocks its page

    def _write(self, method: str, session: str | None, params: Json) -> int:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        os.write(self._out, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        return self._number

    def _receive(self) -> Json:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], TIMEOUT_S)
            assert ready, "chromium does not answer"
            found = os.read(self._in, 1 << 20)
            assert found, "chromium ended"
            self._buffer += found
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    @contextmanager
    def open(
        self, path: Path, *, fragment: str = "", script: bool = True, width: int = 1280, height: int = 900
    ) -> Iterator["Page"]:
        """The page at `path` in a tab of its own, loaded; without `script` the browser runs none."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.events.clear()
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.send(f"{domain}.enable")
        page.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        if not script:
            page.send("Emulation.setScriptExecutionDisabled", value=True)
        page.send("Page.navigate", url=path.as_uri() + fragment)
        page.wait_for("Page.loadEventFired")
        yield page
        self.send("Target.closeTarget", targetId=target)


class Page:
    """An open tab."""

    def __init__(self, browser: Chromium, session: str) -> None:
        self.browser, self._session = browser, session

    def send(self, method: str, **params: Any) -> Json:
        return self.browser.send(method, self._session, **params)

    def wait_for(self, method: str) -> Json:
        """The first event of that kind, past ones among them."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            for event in self.browser.events:
                if event.get("method") == method:
                    return event["params"]
            self.send("Page.getResourceTree")
            time.sleep(0.01)
        raise AssertionError(f"no {method}")

    def of(self, *methods: str) -> list[Json]:
        """What happened so far."""
        self.evaluate("1")  # an answer comes after the events before it
        return [event["params"] for event in self.browser.events if event.get("method") in methods]

    def evaluate(self, expression: str) -> Any:
        """The value of an expression, awaited; AssertionError if it throws."""
        done = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    @property
    def complaints(self) -> list[str]:
        """Errors and warnings of the console, exceptions, and what a policy refused."""
        found = [entry["entry"]["text"] for entry in self.of("Log.entryAdded")]
        found += [str(call["args"]) for call in self.of("Runtime.consoleAPICalled")]
        return found + [str(thrown["exceptionDetails"]) for thrown in self.of("Runtime.exceptionThrown")]

    @property
    def requests(self) -> list[str]:
        """Addresses that were asked for, but the page itself and what it carries."""
        urls = [sent["request"]["url"] for sent in self.of("Network.requestWillBeSent")]
        return [url for url in urls[1:] if not url.startswith(("data:", "blob:"))]

    @property
    def dialogs(self) -> int:
        """How many alerts were opened."""
        return len(self.of("Page.javascriptDialogOpening"))

    def click(self, selector: str) -> None:
        """A real click in the middle of the first such element."""
        x, y = self.place(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def move(self, x: float, y: float) -> None:
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def place(self, selector: str) -> tuple[float, float]:
        """The middle of the first such element, scrolled into view."""
        found = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center', inline: 'center'});"
            " const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        return found[0], found[1]

    def press(self, key: str) -> None:
        """A key with its default action."""
        text = {"Enter": "\r", " ": " "}.get(key)
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, **({"text": text} if text else {}))
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, code=key)

    def saved(self, selector: str) -> Path:
        """Click, and the file that is downloaded then."""
        self.browser.events.clear()
        self.click(selector)
        name = self.wait_for("Browser.downloadWillBegin")["suggestedFilename"]
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            if any(event["state"] == "completed" for event in self.of("Browser.downloadProgress")):
                return self.browser.downloads / name
            self.evaluate("1")
            time.sleep(0.01)
        raise AssertionError(f"{name} was not saved")

    def screenshot(self, path: Path, **options: Any) -> Path:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png", **options)["data"]))
        return path

    def pdf(self, path: Path) -> Path:
        path.write_bytes(base64.b64decode(self.send("Page.printToPDF", preferCSSPageSize=True)["data"]))
        return path
