"""The pages in a browser, headless Chromium, as their users see them."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import threading
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait
from tests.server.conftest import Served

MODEL = "smollm2-135m-instruct"
LONG = "Write a very long story about the sea. Do not stop."
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs the packages chromium and chromium-driver")

CONTRAST = """
  const parse = color => color.match(/[\\d.]+/g).map(Number)
  const light = ([r, g, b]) => [r, g, b].map(c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0)
  const page = Object.assign(document.body.appendChild(document.createElement("i")), { style: "background: Canvas" })
  return ["user", "assistant", "reasoning", "note", "error"].map(kind => {
    const part = Object.assign(talk.appendChild(document.createElement("div")), { className: kind })
    const own = parse(getComputedStyle(part).backgroundColor), text = light(parse(getComputedStyle(part).color))
    const back = light(own[3] === 0 ? parse(getComputedStyle(page).backgroundColor) : own)
    return (Math.max(text, back) + 0.05) / (Math.min(text, back) + 0.05)
  })
"""


class Page:
    """What a user does and sees."""

    def __init__(self, browser: Chrome, url: str) -> None:
        self.browser, self.url = browser, url
        browser.get(url)
        self.until(lambda: self.text("#rate") != "-")

    def until(self, holds: Callable[[], bool]) -> None:
        WebDriverWait(self.browser, 30, 0.02).until(lambda _: holds())

    def text(self, where: str) -> str:
        return self.browser.find_element(By.CSS_SELECTOR, where).text

    def texts(self, where: str) -> list[str]:
        return [one.text for one in self.browser.find_elements(By.CSS_SELECTOR, where)]

    def enter(self, where: str, text: str) -> None:
        self.browser.find_element(By.CSS_SELECTOR, where).send_keys(text)

    def click(self, where: str) -> None:
        self.browser.find_element(By.CSS_SELECTOR, where).click()

    def ask(self, text: str, tokens: int | None = None) -> None:
        self.run(f"temperature.value = 0; tokens.value = '{tokens or ''}'")  # elements are globals by their id
        self.enter("#text", text + "\n")

    def ask_and_wait(self, text: str, tokens: int) -> str:
        """The answer."""
        self.ask(text, tokens)
        self.until(lambda: not self.is_busy())
        return self.texts(".assistant")[-1]

    def is_busy(self) -> bool:
        return not self.browser.find_element(By.ID, "send").is_enabled()

    def run(self, script: str) -> Any:
        return self.browser.execute_script(script)

    def requests(self) -> list[dict[str, Any]]:
        """What the browser has asked for since this was last called."""
        events = (json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance"))
        return [one["params"]["request"] for one in events if one["method"] == "Network.requestWillBeSent"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with TemporaryDirectory(ignore_cleanup_errors=True) as path:
        chrome = Chrome(options, Service(str(DRIVER), env={**os.environ, "TMPDIR": path}))
        yield chrome
        chrome.quit()


@pytest.fixture
def quiet(browser: Chrome) -> Iterator[Chrome]:
    """Without an error in its console, beside requests that were refused, at the end."""
    browser.get_log("browser")
    browser.get_log("performance")
    yield browser
    assert [entry for entry in browser.get_log("browser") if entry["source"] != "network"] == []
    browser.get("about:blank")


@pytest.fixture
def page(quiet: Chrome, served: Served) -> Page:
    return Page(quiet, f"{served.url}/")


@pytest.fixture(scope="module")
def behind_a_proxy() -> Iterator[str]:
    """URL of a server that needs the key "secret", behind a proxy that has put it at /llm."""
    server = Served(MODEL, "--threads", "1", "--root-path", "/llm", "--api-key", "secret")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            prefix, path = self.path[: len("/llm/")], self.path[len("/llm") :]
            if prefix != "/llm/":
                self.send_error(404)
                return
            connection = http.client.HTTPConnection(urlsplit(server.url).netloc)
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {name: self.headers[name] for name in ("authorization", "content-type") if name in self.headers}
            connection.request(self.command, path, body, headers)
            answer = connection.getresponse()
            self.send_response(answer.status)
            self.send_header("content-type", answer.getheader("content-type", ""))
            self.end_headers()
            while piece := answer.read1():
                self.wfile.write(piece)
            connection.close()

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=proxy.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{proxy.server_port}/llm/"
    proxy.shutdown()
    thread.join()
    proxy.server_close()
    assert server.end() == 0, server.log


def _metric(url: str, name: str) -> float:
    with urllib.request.urlopen(f"{url}metrics") as answer:
        found = re.search(rf"^headway:{name}\{{.*\}} (\S+)$", answer.read().decode(), re.MULTILINE)
    assert found
    return float(found.group(1))


def _asked(page: Page) -> list[list[dict[str, str]]]:
    """The messages of each request."""
    posts = (one for one in page.requests() if one["method"] == "POST")
    return [json.loads(one.get("postData", '{"messages": []}'))["messages"] for one in posts]


def test_a_question_is_answered_in_pieces(page: Page) -> None:
    page.run("""
      window.seen = new Set()
      new MutationObserver(() => seen.add(document.querySelector(".assistant")?.textContent))
        .observe(document.getElementById("talk"), { subtree: true, childList: true, characterData: true })
    """)
    answer = page.ask_and_wait("Name three colours.", 20)
    pieces = page.run("return [...seen]")
    assert len(pieces) > 5
    assert all(answer.startswith(piece.strip()) for piece in pieces if piece)
    assert page.texts(".user") == ["Name three colours."]
    assert re.match(r"\d+ tokens, the first after \d+\.\d\d s, \d+ tokens/s", page.texts(".note")[-1])
    assert page.text("#model") == MODEL == page.browser.title


def test_a_conversation_keeps_its_turns_until_a_new_one(page: Page) -> None:
    first = page.ask_and_wait("My name is Ada.", 12)
    page.ask_and_wait("What is my name?", 12)
    page.click("#new")
    assert page.text("#talk") == ""
    page.ask_and_wait("Hello.", 4)
    asked = _asked(page)
    ada, what, hello = ({"role": "user", "content": text} for text in ("My name is Ada.", "What is my name?", "Hello."))
    answer = asked[1][1]
    assert asked == [[ada], [ada, answer, what], [hello]]
    assert answer["role"] == "assistant"
    assert answer["content"].strip() == first.strip()


def test_stop_ends_the_answer_and_its_request(page: Page) -> None:
    page.ask(LONG)
    page.until(lambda: bool(page.texts(".content")))
    assert _metric(page.url, "num_requests_running") == 1
    page.click("#stop")
    page.until(lambda: not page.is_busy())
    page.until(lambda: _metric(page.url, "num_requests_running") == 0)
    assert page.texts(".note") == ["stopped"]
    assert page.ask_and_wait("Go on.", 4)


def test_a_new_conversation_ends_the_answer_to_the_last_one(page: Page) -> None:
    page.ask(LONG)
    page.until(lambda: bool(page.texts(".content")))
    page.click("#new")
    page.until(lambda: not page.is_busy())
    page.until(lambda: _metric(page.url, "num_requests_running") == 0)
    assert page.text("#talk") == ""


def test_the_numbers_move_under_load(page: Page) -> None:
    page.ask(LONG)
    page.until(lambda: page.text("#running") == "1" and int(page.text("#rate")) > 0 and page.text("#cache") != "0.0 %")
    assert page.text("#waiting") == "0"
    page.click("#stop")
    page.until(lambda: (page.text("#running"), page.text("#rate")) == ("0", "0"))


def test_an_error_is_shown_and_the_question_can_be_mended(page: Page) -> None:
    page.run("document.querySelector('textarea').value = 'x '.repeat(9000)")
    page.ask("!")
    page.until(lambda: bool(page.texts("[role=alert]")))
    assert "max_model_len" in page.text("[role=alert]")
    assert page.run("return document.querySelector('textarea').value").startswith("x x x")
    page.run("document.querySelector('textarea').value = ''")
    page.ask_and_wait("Again.", 4)
    assert [one["content"] for one in _asked(page)[-1]] == ["Again."]


def test_what_looks_like_markup_is_text(page: Page) -> None:
    text = "<img src=x onerror='document.title=1'><b>Repeat</b> `this`: **bold**"
    page.ask_and_wait(text, 8)
    assert page.texts(".user") == [text]
    assert page.run("return document.querySelectorAll('#talk img, #talk b').length") == 0


def test_nothing_is_loaded_from_other_hosts(page: Page) -> None:
    page.ask_and_wait("Hello.", 4)
    page.browser.get(f"{page.url}docs")
    page.until(lambda: len(page.texts("details")) > 5)
    asked = [one["url"] for one in page.requests()]
    assert len(asked) > 5
    assert [url for url in asked if not url.startswith((page.url, "data:"))] == []


def test_a_server_that_dies_is_told_and_what_it_said_stays(quiet: Chrome) -> None:
    server = Served(MODEL, "--threads", "1")
    page = Page(quiet, f"{server.url}/")
    page.ask(LONG)
    page.until(lambda: bool(page.texts(".content")))
    server.end(signal.SIGKILL)
    page.until(lambda: bool(page.texts(".error")))
    assert page.text(".content")
    assert not page.is_busy()
    page.until(lambda: page.text("#running") == "-")


def test_behind_a_proxy_the_key_is_asked_for_and_used(quiet: Chrome, behind_a_proxy: str) -> None:
    page = Page(quiet, behind_a_proxy)
    page.until(lambda: page.text("#model") == "headway: wrong or missing API key")
    page.ask("Hello.", 4)
    page.until(lambda: page.texts(".error") == ["wrong or missing API key"])
    page.click("summary")
    page.enter("#key", "secret")
    assert page.ask_and_wait("Hello.", 4)
    page.until(lambda: page.text("#model") == MODEL)
    page.click("nav a")
    page.until(lambda: "POST /v1/chat/completions" in page.text("main"))


def test_it_fits_a_phone(page: Page) -> None:
    phone = {"width": 360, "height": 640, "deviceScaleFactor": 2, "mobile": True}
    try:
        page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        page.ask_and_wait(LONG, 200)
        assert page.run("return document.scrollingElement.scrollWidth <= screen.width")
        assert page.run("return document.getElementById('new').getBoundingClientRect().bottom <= innerHeight")
        last = "document.getElementById('talk').lastChild.getBoundingClientRect().bottom"
        assert page.run(f"return {last} <= document.querySelector('main').getBoundingClientRect().bottom")
        page.browser.get(f"{page.url}docs")
        page.until(lambda: len(page.texts("details")) > 5)
        page.run("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert page.run("return document.scrollingElement.scrollWidth <= screen.width")
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_in_light_and_dark(scheme: str, page: Page) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    assert page.run(f"return matchMedia('(prefers-color-scheme: {scheme})').matches")
    assert min(page.run(CONTRAST)) >= 4.5  # WCAG 2, AA


def test_every_control_has_a_name(page: Page) -> None:
    page.click("summary")
    nodes = page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    controls = [one for one in nodes if one.get("role", {}).get("value") in ("textbox", "spinbutton", "button", "link")]
    assert len(controls) == 9
    assert all(one["name"]["value"] for one in controls)


def test_the_docs_name_every_field_and_lead_to_its_type(quiet: Chrome, served: Served) -> None:
    quiet.get(f"{served.url}/docs")
    WebDriverWait(quiet, 30).until(lambda _: quiet.find_elements(By.CSS_SELECTOR, "details"))
    titles = [one.text.partition("\n")[0] for one in quiet.find_elements(By.TAG_NAME, "summary")]
    chat = next(i for i, title in enumerate(titles) if title.startswith("POST /v1/chat/completions"))
    part = quiet.find_elements(By.TAG_NAME, "details")[chat]
    part.find_element(By.TAG_NAME, "summary").click()
    rows = [row.text for row in part.find_elements(By.TAG_NAME, "tr")]
    assert "messages list of object required" in rows
    assert "top_k integer" in [row.strip() for row in rows]
    links = part.find_elements(By.CSS_SELECTOR, "td a")
    assert links
    assert all(quiet.find_elements(By.ID, str(link.get_dom_attribute("href"))[1:]) for link in links)
