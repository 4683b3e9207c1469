"""The chat page: what is sent, and in a real browser how it is used."""

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dashinfer.errors import InternalError
from dashinfer.serving.service import TextModel

from . import seeing
from .browser import Page, browse, find
from .conftest import RunServer
from .fake_engine import END, FakeEngine, SeeingEngine

pytestmark = pytest.mark.feature("Clients", "Chat page")

chromium = find()
needs_browser = pytest.mark.skipif(chromium is None, reason="no Chromium on this machine")

LAST = "[...document.querySelectorAll('.assistant')].at(-1)"
ANSWER = f"{LAST}?.querySelector('.text').textContent"
FIGURES = f"{LAST}?.querySelector('.figures').textContent"
IDLE = "document.querySelector('#stop').hidden"


@pytest.fixture
async def page(tmp_path: Path) -> AsyncIterator[Page]:
    assert chromium is not None
    async with browse(chromium, tmp_path / "profile") as page:
        yield page
        assert page.complaints == []


async def say(page: Page, text: str) -> None:
    await page.run("document.querySelector('#prompt').focus()")
    await page.type(text)
    await page.press("Enter")


def prompts(engine: FakeEngine) -> list[str]:
    """What the engine was given, as text; the template puts nothing between messages."""
    return [bytes(token for token in prompt if token < END).decode() for prompt, *_ in engine.submitted]


async def test_files(run_server: RunServer) -> None:
    key = {"authorization": "Bearer sk-1"}
    async with run_server(api_keys=("sk-1",)) as server:
        home = await server.client.get("/")
        named = re.findall(r'(?:href|src)="([^"]+)"', home.text)
        files = {name: await server.client.get(f"/{name}") for name in named}
        script = files["chat/chat.js"].text
        imported = [await server.client.get(f"/chat/{name}") for name in re.findall(r'from "\./([^"]+)"', script)]
        other = [
            (await server.client.get(f"/chat/{name}", headers=key)).status_code
            for name in ("favicon.png", "chat.html", "%2e%2e/app.py")
        ]

    policy = home.headers["content-security-policy"]
    assert home.headers["content-type"] == "text/html; charset=utf-8"
    assert "unsafe" not in policy and "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert named and imported
    assert {answer.status_code for answer in [*files.values(), *imported]} == {200}
    assert files["chat/chat.js"].headers["content-type"] == "text/javascript; charset=utf-8"
    assert not any("://" in answer.text for answer in [home, files["chat/chat.css"], files["chat/chat.js"], *imported])
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", script)
    assert other == [404, 404, 404]


@needs_browser
async def test_a_conversation(run_server: RunServer, page: Page) -> None:
    async with run_server() as server:
        await page.go(server.url)
        await page.until("document.querySelector('#model').textContent === 'demo'")
        assert await page.run("document.activeElement.id") == "prompt"
        await say(page, "say <img src=x onerror=alert(1)> & größe \u2028 \U0001f600")
        await page.until(f"{IDLE} && {ANSWER}?.endsWith('\U0001f600')")
        first = await page.run(ANSWER)
        pictures = await page.run("document.querySelectorAll('#turns img').length")
        figures = await page.run(FIGURES)
        await page.click("#open-settings")
        for id, value in {"temperature": "0.25", "max-tokens": "3", "system": "be brief"}.items():
            await page.click(f"#{id}")
            await page.type(value)
        await page.click("#prompt")
        await page.type("say two")
        await page.press("Enter", shift=True)
        await page.type("lines")
        await page.click("#send")
        await page.until(f"{IDLE} && {ANSWER} === 'two'")
        cut = await page.run(FIGURES)
        await page.click("#clear")
        await say(page, "say new")
        await page.until(f"{IDLE} && {ANSWER} === 'new'")
        hidden = await page.run("document.querySelector('#attach').hidden")
        await page.go(server.url)
        await page.until("document.querySelector('#model').textContent === 'demo'")
        kept = await page.run("document.querySelector('#system').value")

    assert first == "<img src=x onerror=alert(1)> & größe \u2028 \U0001f600"
    assert pictures == 0
    assert re.fullmatch(r"\d+ tokens, [\d.]+ tokens/s, first after [\d.]+ s", figures)
    assert cut.startswith("3 tokens") and cut.endswith("; cut short by the limit of tokens")
    assert (hidden, kept) == (True, "be brief")
    user = f"user: say {first}"
    assert prompts(server.engine) == [
        user,
        f"system: be brief{user}assistant: {first}user: say two\nlines",
        "system: be briefuser: say new",
    ]
    assert [params[0].temperature for _, params, _ in server.engine.submitted][1:] == [0.25, 0.25]


@needs_browser
async def test_stopping_and_leaving(run_server: RunServer, page: Page) -> None:
    async with run_server() as server:
        await page.go(server.url)
        await say(page, "wait abc")
        await page.until(f"{ANSWER} === 'a'")  # streamed: the rest has not come
        await page.click("#stop")
        await server.engine.until(lambda: server.engine.running == 0)
        await page.until(IDLE)
        assert "stopped" in await page.run(FIGURES)
        await say(page, "wait xyz")
        await page.until(f"{ANSWER} === 'x'")
        await page.press("Escape")
        await server.engine.until(lambda: server.engine.running == 0)
        await page.until(IDLE)
        await say(page, "wait 123")
        await page.until(f"{ANSWER} === '1'")
        await page.go("about:blank")
        await server.engine.until(lambda: server.engine.running == 0)

    assert prompts(server.engine)[2] == "user: wait abcassistant: auser: wait xyzassistant: xuser: wait 123"
    assert server.engine.record.count("end") == 3


@needs_browser
async def test_keys_and_errors(run_server: RunServer, page: Page) -> None:
    async with run_server(api_keys=("sk-1",)) as server:
        await page.go(server.url)
        await say(page, "say hello")
        await page.until(f"{IDLE} && {LAST}?.querySelector('.error') !== null")
        error = await page.run(f"{LAST}.querySelector('.error').textContent")
        assert await page.run("document.activeElement.id") == "api-key"
        await page.type("sk-1")
        await page.run("document.querySelector('#prompt').focus()")
        await page.press("Enter")  # what could not be sent is there again
        await page.until(f"{IDLE} && {ANSWER} === 'hello'")
        await say(page, "wait abc")
        await page.until(f"{ANSWER} === 'a'")
        server.engine.lost = InternalError("the engine lost this request")
        server.engine.release.set()
        await page.until(f"{IDLE} && {LAST}.querySelector('.error') !== null")
        lost = await page.run(f"{LAST}.querySelector('.error').textContent")
        stored = await page.run("[sessionStorage.getItem('api-key'), localStorage.length, document.cookie]")
        page.complaints = [text for text in page.complaints if "401" not in text]

    assert "API key" in error
    assert lost == "the engine lost this request"
    assert stored == ["sk-1", 0, ""]


@needs_browser
async def test_images(run_server: RunServer, page: Page, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(seeing.encode(seeing.picture(60, 90)))
    model = seeing.make_text(seeing.write_model(tmp_path / "model"))
    async with run_server(engine_type=SeeingEngine, model=model) as server:
        await page.go(server.url)
        await page.until("!document.querySelector('#attach').hidden")
        await page.choose_files("#files", picture, picture)
        await page.until("document.querySelectorAll('#images img').length === 2")
        await page.click("#images li:last-child button")
        await page.run(
            "(async () => { const data = new DataTransfer();"
            f"const bytes = new Uint8Array({json.dumps(list(seeing.encode(seeing.picture(33, 41, 2))))});"
            "data.items.add(new File([bytes], 'pasted.png', { type: 'image/png' }));"
            "document.querySelector('#prompt').dispatchEvent("
            "new ClipboardEvent('paste', { clipboardData: data, bubbles: true, cancelable: true })); })()"
        )
        await page.until("document.querySelectorAll('#images img').length === 2")
        await say(page, "say two pictures")
        await page.until(f"{IDLE} && {ANSWER} === 'two pictures'")
        shown = "[...document.querySelectorAll('.user img')].map((picture) => [picture.naturalWidth, picture.naturalHeight])"
        sizes = await page.run(shown)

    assert sizes == [[90, 60], [41, 33]]
    ((prompt, _, media),) = server.engine.submitted
    assert media is not None
    assert prompt.count(seeing.START) == 2


@needs_browser
async def test_waits_for_the_model_below_a_prefix(run_server: RunServer, page: Page, text: TextModel) -> None:
    async with run_server(ready=False, root_path="/api") as server:
        await page.go(f"{server.url}/api/")
        await page.until("document.querySelector('#status').textContent === 'The server is loading.'")
        server.service.ready(server.engine, text)
        await page.until("document.querySelector('#model').textContent === 'demo'")
        page.complaints = [text for text in page.complaints if "503" not in text]


@needs_browser
async def test_phones_and_the_dark(run_server: RunServer, page: Page) -> None:
    async with run_server() as server:
        await page.call("Emulation.setDeviceMetricsOverride", width=320, height=568, deviceScaleFactor=2, mobile=True)
        await page.go(server.url)
        await say(page, "say " + "wide" * 200)
        await page.until(f"{IDLE} && {ANSWER}?.length === 800")
        await page.click("#open-settings")
        wide = await page.run("[document.documentElement.scrollWidth, document.querySelector('#turns').scrollWidth]")
        sizes = await page.run(
            "[...document.querySelectorAll('button')].filter((b) => b.offsetHeight).map((b) => b.offsetHeight)"
        )
        below = await page.run("document.querySelector('#send').getBoundingClientRect().bottom")
        colours = []
        for scheme in ("light", "dark"):
            await page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            colours.append(await page.run("getComputedStyle(document.body).backgroundColor"))

    assert max(wide) <= 320 and below <= 568
    assert min(sizes) >= 44  # WCAG 2.2, 2.5.5
    assert colours == ["rgb(255, 255, 255)", "rgb(20, 22, 26)"]


@pytest.mark.feature("Endpoints", "API as a document")
@needs_browser
async def test_docs(run_server: RunServer, page: Page) -> None:
    async with run_server() as server:
        await page.go(f"{server.url}/docs")
        await page.until("document.querySelectorAll('.opblock').length > 10")
