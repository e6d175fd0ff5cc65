"""The page at / in a real browser: Debian's chromium without a window."""

import base64
import json
import shutil

import numpy as np
import pytest

from tests.report.test_browser import FLAGS
from tests.server.served import Server, until

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")
from selenium.webdriver.chrome.service import Service  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="chromium or chromedriver is not installed: apt-get install chromium chromium-driver",
)
HEADS, SHAPE = 2, (-1, 2, 2, 2)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    for flag in (*FLAGS, f"--user-data-dir={profile}", "--window-size=1280,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_script_timeout(30)
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, server):
    """The page, loaded anew; afterwards the console is silent and no other host was asked."""
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(f"{server.url}/")
    until(lambda: js(browser, "return document.documentElement.dataset.ready") == "true")
    yield browser
    assert browser.get_log("browser") == []
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [
        m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"
    ]
    assert f"{server.url}/v1/models" in urls
    assert [u for u in urls if not u.startswith((f"{server.url}/", "data:", "chrome:"))] == []


def js(browser, code, *arguments):
    return browser.execute_script(f"const $ = (s) => document.querySelector(s); {code}", *arguments)


def fill(browser, selector, value):
    js(browser, "$(arguments[0]).value = arguments[1]", selector, value)


def write(browser, prompt):
    fill(browser, "#text", prompt)
    browser.find_element("css selector", "#send").click()


def texts(browser):
    return js(browser, "return [...document.querySelectorAll('.output')].map(o => o.textContent)")


def done(browser):
    until(lambda: not js(browser, "return $('#send').disabled"))


def test_it_writes_what_the_api_writes(page, server):
    fill(page, "input[name=max_tokens]", 24)
    fill(page, "input[name=seed]", 4)
    write(page, "def x ")
    done(page)
    reply = server.complete(prompt="def x ", max_tokens=24, seed=4, temperature=0.8, logprobs=5)
    choice = reply["choices"][0]
    assert texts(page) == ["def x " + choice["text"]]
    rare = js(
        page,
        "return [...document.querySelectorAll('.token')].map(t => +t.style.getPropertyValue('--rarity'))",
    )
    expected = [min(1, -p / 6.907755) for p in choice["logprobs"]["token_logprobs"]]
    assert rare == pytest.approx(expected, abs=2e-3)
    assert "24 tokens · first after" in js(page, "return $('.facts').textContent")


def test_a_token_shows_its_alternatives_and_its_experts(page, server):
    fill(page, "input[name=max_tokens]", 6)
    fill(page, "input[name=temperature]", 0)
    write(page, "def x ")
    done(page)
    js(
        page,
        "document.querySelectorAll('.token')[2].dispatchEvent(new PointerEvent('pointerenter'))",
    )
    rows = js(
        page,
        "return [...document.querySelectorAll('.alternatives tr')].map(r => [...r.cells].map(c => c.textContent))",
    )
    ask = {"prompt": "def x ", "max_tokens": 6, "temperature": 0}
    whole = server.complete(**ask, logprobs=5)["choices"][0]["logprobs"]["top_logprobs"][2]
    assert len(rows) == 5 and float(rows[0][1]) == pytest.approx(
        2.718281828 ** max(whole.values()), abs=1e-4
    )
    assert js(page, "return document.querySelectorAll('.alternatives .drawn').length") == 1
    cells = "return [...document.querySelectorAll('.experts tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    shown = js(page, cells)
    assert [row[0] for row in shown] == ["layer 0", "layer 1"] and len(shown[0]) == 1 + HEADS
    asked = server.complete(**ask, return_routed_experts=True, return_expert_gates=True)
    read = 6 + 2
    experts, gates = (
        np.frombuffer(base64.b64decode(asked["choices"][0][name]), kind).reshape(SHAPE)[read]
        for name, kind in (("routed_experts", np.int16), ("expert_gates", np.float32))
    )
    chips = "return [...document.querySelectorAll('.expert')].map(e => [e.textContent, +e.style.getPropertyValue('--gate')])"
    texts, shades = zip(*js(page, chips), strict=True)
    assert list(texts) == [
        f"{e} {g:.2f}" for e, g in zip(experts.flat, gates.flat.copy(), strict=True)
    ]
    assert list(shades) == pytest.approx((gates / gates.max()).flatten(), abs=1e-3)
    js(page, "$('.output').dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}))")
    assert (
        js(
            page,
            "return [...document.querySelectorAll('.token')].findIndex(t => t.classList.contains('chosen'))",
        )
        == 3
    )


def test_experts_come_while_the_reply_is_written(page):
    fill(page, "input[name=max_tokens]", 240)
    write(page, "x")
    shown = "return document.querySelectorAll('.token').length"
    until(lambda: js(page, shown) > 3)
    js(page, "document.querySelectorAll('.token')[1].click()")
    assert js(page, "return document.querySelectorAll('.experts .expert').length") == 8
    assert js(page, "return $('#send').disabled"), "it still writes"
    js(page, "[...document.querySelectorAll('.token')].at(-1).click()")
    # the newest has none until it is read
    until(lambda: js(page, "return document.querySelectorAll('.experts .expert').length") == 8)
    js(page, "$('#stop').click()")
    done(page)
    js(page, "[...document.querySelectorAll('.token')].at(-1).click()")
    assert "never read" in js(page, "return $('.experts').textContent")


def test_two_requests_side_by_side(page):
    page.find_element("css selector", "#compare").click()
    fill(page, "input[name=max_tokens]", 12)
    js(page, "document.querySelectorAll('input[name=max_tokens]')[1].value = 7")
    write(page, "x ")
    done(page)
    counts = js(
        page,
        "return [...document.querySelectorAll('.column')].map(c => c.querySelectorAll('.token').length)",
    )
    assert counts == [12, 7]
    boxes = js(
        page,
        "return [...document.querySelectorAll('.column')].map(c => [c.getBoundingClientRect().left, c.getBoundingClientRect().top])",
    )
    assert boxes[0][1] == boxes[1][1] and boxes[0][0] < boxes[1][0]


def test_a_long_run_of_spaces_stays_in_its_column(page):
    fill(page, "input[name=max_tokens]", 1)
    write(page, " " * 240)
    done(page)
    ends = "return ['.given', '.column'].map(s => $(s).getBoundingClientRect().right)"
    text, column = js(page, ends)
    assert text < column


def test_stop_frees_the_blocks(page, server):
    fill(page, "input[name=max_tokens]", 250)
    page.find_element("css selector", "#compare").click()
    js(page, "document.querySelectorAll('input[name=max_tokens]')[1].value = 250")
    write(page, "x")
    js(page, "$('#stop').click()")
    done(page)
    server.wait_for("cache_blocks_used", 0)
    assert "stopped" in js(page, "return $('.facts').textContent")


def test_a_chat_remembers(page, server):
    page.find_element("css selector", "input[value=chat] + span").click()
    fill(page, "input[name=max_tokens]", 5)
    fill(page, "#system", "def")
    for text in ("x", "y"):
        write(page, text)
        done(page)
    turns = js(page, "return [...document.querySelectorAll('.turn')].map(t => t.dataset.role)")
    assert turns == ["user", "assistant"] * 2
    said = js(page, "return [...document.querySelectorAll('.turn')].map(t => t.textContent)")
    before = [{"role": r, "content": c} for r, c in zip(turns, said, strict=True)][:3]
    messages = [{"role": "system", "content": "def"}, *before]
    count = server.post("/tokenize", {"messages": messages}).json()["count"]
    assert f"of {count} prompt tokens cached" in js(page, "return $('.facts').textContent")
    page.find_element("css selector", "#reset").click()
    assert texts(page) == [""]


def test_a_mistake_is_shown(page):
    fill(page, "input[name=max_tokens]", 9999)
    write(page, "x")
    done(page)
    assert "max_tokens is 9999; use a whole number" in texts(page)[0]
    page.get_log("browser")  # the browser reports each 4xx


def test_light_and_dark(page):
    background = "return getComputedStyle(document.body).backgroundColor"
    before = js(page, background)
    page.find_element("css selector", "#theme").click()
    assert js(page, background) != before


def test_with_a_key(browser, run, tmp_path):
    server = Server(run, log=tmp_path / "log.txt", HEADWAY_API_KEY="secret")
    try:
        browser.get(f"{server.url}/")
        until(lambda: js(browser, "return document.documentElement.dataset.ready") == "true")
        assert js(browser, "return $('#key-row').hidden") is False
        js(browser, "$('#key').value = 'secret'; $('#key').dispatchEvent(new Event('change'))")
        until(lambda: js(browser, "return $('#model').textContent") == "run")
        browser.get_log("browser")
        assert server.stop()[0] == 0
    finally:
        server.kill()
