"""Headless Chromium over its DevTools protocol (https://chromedevtools.github.io/devtools-protocol/), by a pair of pipes."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from fcntl import F_DUPFD_CLOEXEC, fcntl
from pathlib import Path
from typing import Any

import trio

PATIENCE = 60.0  # seconds
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--mute-audio"),
    *("--disable-background-networking", "--disable-component-update", "--disable-extensions", "--disable-sync"),
    *("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--remote-debugging-pipe"),
)


def find() -> str | None:
    """The path of a Chromium, if there is one."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for name in names if (path := shutil.which(name))), None)


class Page:
    """A tab. `complaints`: uncaught exceptions, and what the browser says of the page: refused by a policy, not found."""

    def __init__(self, reading: trio.lowlevel.FdStream, writing: trio.lowlevel.FdStream) -> None:
        self.complaints: list[str] = []
        self._reading, self._writing = reading, writing
        self._answers: dict[int, dict[str, Any]] = {}
        self._came = trio.Event()
        self._session: str | None = None
        self._last = 0

    async def listen(self) -> None:
        """Take what the browser says, until it is gone."""
        rest = b""
        async for piece in self._reading:
            *messages, rest = (rest + piece).split(b"\0")
            for message in map(json.loads, messages):
                if "id" in message:
                    self._answers[message["id"]] = message
                    self._came.set()
                    self._came = trio.Event()
                elif message["method"] == "Runtime.exceptionThrown":
                    self.complaints.append(json.dumps(message["params"]["exceptionDetails"]))
                elif message["method"] == "Log.entryAdded" and message["params"]["entry"]["level"] in ("warning", "error"):
                    self.complaints.append(message["params"]["entry"]["text"])

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command's result."""
        self._last += 1
        number = self._last
        session = {} if self._session is None else {"sessionId": self._session}
        message = {"id": number, "method": method, "params": params, **session}
        with trio.fail_after(PATIENCE):
            await self._writing.send_all(json.dumps(message).encode() + b"\0")
            while number not in self._answers:
                await self._came.wait()
        answer = self._answers.pop(number)
        assert "error" not in answer, answer
        return answer["result"]

    async def open(self) -> None:
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            await self.call(f"{domain}.enable")

    async def go(self, url: str) -> None:
        """Returns once the document has been loaded."""
        assert "errorText" not in await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete'")

    async def run(self, script: str) -> Any:
        """The value of an expression, awaited where it is a promise."""
        found = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    async def until(self, condition: str) -> None:
        """Returns once an expression holds."""
        with trio.move_on_after(PATIENCE / 2):
            while not await self.run(condition):
                await trio.sleep(0.02)
            return
        raise AssertionError(f"{condition} does not hold: {await self.run('document.body.innerText')!r}; {self.complaints}")

    async def type(self, text: str) -> None:
        """Into what has the focus."""
        await self.call("Input.insertText", text=text)

    async def press(self, key: str, *, shift: bool = False) -> None:
        code = {"Enter": 13, "Escape": 27, "Tab": 9}[key]
        params = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        text = {"text": "\r"} if key == "Enter" else {}
        await self.call("Input.dispatchKeyEvent", type="keyDown", **params, **text)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **params)

    async def click(self, selector: str) -> None:
        """With the mouse, in the middle of what is shown; fails where something else lies there."""
        box = f"document.querySelector({json.dumps(selector)})"
        x, y = await self.run(
            f"(() => {{ const e = {box}, b = e.getBoundingClientRect(), p = [b.x + b.width / 2, b.y + b.height / 2];"
            " return e.contains(document.elementFromPoint(...p)) ? p : [-1, -1]; })()"
        )
        assert x >= 0, f"{selector} is not in sight"
        for kind in ("mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def choose_files(self, selector: str, *paths: Path) -> None:
        document = await self.call("DOM.getDocument")
        found = await self.call("DOM.querySelector", nodeId=document["root"]["nodeId"], selector=selector)
        await self.call("DOM.setFileInputFiles", nodeId=found["nodeId"], files=[str(path) for path in paths])


@asynccontextmanager
async def browse(chromium: str, folder: Path) -> AsyncIterator[Page]:
    """A page of a browser of its own, whose profile is kept in `folder`; it and all of its processes are gone afterwards."""
    commands, ours_out = os.pipe()
    ours_in, events = os.pipe()
    theirs = [fcntl(end, F_DUPFD_CLOEXEC, 20) for end in (commands, events)]  # not where they are to be put
    os.close(commands)
    os.close(events)
    script = f'exec "$@" 3<&{theirs[0]} 4>&{theirs[1]}'
    command = ["bash", "-c", script, "bash", chromium, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = {**os.environ, "HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "XDG_CACHE_HOME": str(folder)}
    async with trio.lowlevel.FdStream(ours_in) as reading, trio.lowlevel.FdStream(ours_out) as writing:
        process = await trio.lowlevel.open_process(command, pass_fds=theirs, start_new_session=True, env=environment, **quiet)
        for end in theirs:
            os.close(end)
        try:
            async with trio.open_nursery() as nursery:
                page = Page(reading, writing)
                nursery.start_soon(page.listen)
                await page.open()
                yield page
                nursery.cancel_scope.cancel()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with trio.move_on_after(PATIENCE, shield=True):
                await process.wait()
