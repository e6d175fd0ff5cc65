"""The report in a real browser: Debian's chromium without a window."""

import json
import shutil

import pytest

from headway.report.html import write_report
from tests.report.fake_run import make_run
from tests.report.test_html import HOSTILE

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")
from selenium.webdriver.chrome.service import Service  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="chromium or chromedriver is not installed: apt-get install chromium chromium-driver",
)
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
LAYERS, HEADS, EXPERTS = 3, 2, 8
# 60 intervals, 10 evaluations, one interval whose loss and gradient norm are not finite.
POINTS = {
    "bits-per-byte": 59 + 10,
    "loss": 59 + 10,
    "load": LAYERS * HEADS * EXPERTS,
    "load-strip": 3 * 60,
    "entropy": LAYERS * 60,
    "dead": 60,
    "balance_loss": 60,
    "grad_norm": 59,
    "lr": 60,
    "tokens_per_second": 60,
    "flops_per_second": 60,
    "memory_gib": 60,
    "val_calibration_error": 10,
    "reliability": 2,
}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        *FLAGS,
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
        "--window-size=1280,900",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")

    def make(name, **more):
        return make_run(root / name, steps=600, every=10, heads=HEADS, **more)

    return {
        "one": make("one", layers=LAYERS, experts=EXPERTS),
        "two": make("two", layers=2, experts=16, seed=1, lr=1e-3, floor=1.7),
        "wire": make("wire", layers=LAYERS, experts=EXPERTS, wire=True),
        "dense": make("dense", layers=0, seed=2),
        "hostile": make("<i>hostile", layers=1, experts=4, sample=HOSTILE),
    }


def show(browser, tmp_path, *folders):
    """Open the report of these runs; every page must be silent on the console and ask the network
    for nothing."""
    page = write_report(folders, tmp_path / "report.html")
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(page.as_uri())
    assert browser.execute_script("return document.documentElement.dataset.ready") == "true"


def quiet(browser):
    assert browser.get_log("browser") == []
    here = browser.current_url.partition("#")[0]
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [
        m["params"]["request"]["url"]
        for m in sent
        if m["method"] == "Network.requestWillBeSent" and m["params"]["documentURL"] == here
    ]  # not those of the browser's own start page
    assert here in asked
    assert [url for url in asked if url not in (here, "data:,")] == []


def points(browser):
    return browser.execute_script(
        "return Object.fromEntries([...document.querySelectorAll('figure.chart')]"
        ".map(f => [f.id.replace('chart-', ''), Number(f.dataset.points)]))"
    )


def js(browser, code, *arguments):
    return browser.execute_script(f"const $ = (s) => document.querySelector(s); {code}", *arguments)


def test_counted_bytes_stand_beside_the_formula(browser, runs, tmp_path):
    show(browser, tmp_path, runs["wire"])
    sent = {"wire_bytes": 2 * 60, "wire_wait": 60, "wire_layers": LAYERS}
    assert points(browser) == POINTS | sent
    cells = "return [...document.querySelectorAll('#chart-wire_layers tbody tr')].map(r => [...r.children].map(c => c.textContent))"
    rows = browser.execute_script(cells)
    first = f"{6.1e6 / LAYERS:,.7g}", f"{6.0e6 / LAYERS:,.7g}"
    assert rows[0] == ["0", *first, "1.00 %"] and rows[-1][-1] == f"{LAYERS}.00 %"
    widths = "return [...document.querySelectorAll('#chart-wire_layers tbody tr:first-child .bar')].map(b => parseFloat(b.style.width))"
    counted, formula, wait = browser.execute_script(widths)
    assert 0.99 < counted / 100 < 1.01 and abs(formula / counted - 6.0 / 6.1) < 1e-3
    assert abs(wait - 100 / LAYERS) < 1e-3
    quiet(browser)


def test_reliability_is_that_of_the_last_evaluation(browser, runs, tmp_path):
    show(browser, tmp_path, runs["one"])
    cells = "return [...document.querySelectorAll('#chart-reliability tbody tr')].map(r => [...r.children].map(c => c.textContent))"
    assert browser.execute_script(cells) == [
        ["20–30 %", "30", "25.00 %", "50.00 %"],
        ["80–90 %", "1,200", "87.50 %", "75.00 %"],
    ]
    widths = "return [...document.querySelectorAll('#chart-reliability tbody tr:last-child .bar')].map(b => parseFloat(b.style.width))"
    assert browser.execute_script(widths) == [100, 87.5, 75]
    quiet(browser)


def test_each_chart_is_drawn_with_its_points(browser, runs, tmp_path):
    show(browser, tmp_path, runs["one"])
    assert points(browser) == POINTS
    # What is counted is what is drawn: the corners of the paths of the learning-rate and the loss chart.
    corners = "return [...document.querySelectorAll(arguments[0] + ' path.line')].map(p => p.getAttribute('d').match(/[ML]/g).length)"
    assert browser.execute_script(corners, "#chart-lr") == [60]
    assert sorted(browser.execute_script(corners, "#chart-loss")) == [10, 59]
    assert browser.execute_script(corners, "#chart-entropy") == [60] * LAYERS
    cells = js(
        browser,
        "return [...document.querySelectorAll('#chart-load path.cells')].map(p => p.getAttribute('d').match(/M/g).length)",
    )
    assert sum(cells) == LAYERS * HEADS * EXPERTS
    assert (
        js(browser, "return document.querySelectorAll('#chart-grad_norm .mark.skipped').length")
        == 1
    )
    assert js(browser, "return document.querySelectorAll('#chart-loss .mark').length") == 2
    assert js(browser, "return $('#samples-list').dataset.points") == "6"
    assert js(browser, "return $('#events-list').dataset.points") == "3"
    assert js(browser, "return $('#headline').textContent").count("9.48M") == 1
    quiet(browser)


def test_every_image_is_named_and_reached_by_keys(browser, runs, tmp_path):
    show(browser, tmp_path, runs["one"])
    labels = js(
        browser,
        "return [...document.querySelectorAll('figure svg[tabindex]')].map(s => s.getAttribute('role') + s.getAttribute('aria-label'))",
    )
    assert len(labels) == len(POINTS) - 1  # reliability is a table
    assert all(label.startswith("img") and len(label) > 40 for label in labels)
    spoken = js(
        browser,
        "const s = $('#chart-lr svg'); s.focus();"
        "s.dispatchEvent(new KeyboardEvent('keydown', {key: 'Home'})); const a = $('#live').textContent;"
        "s.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'})); return [a, $('#live').textContent]",
    )
    assert spoken[0].startswith("step 10 ") and "one 0.001" in spoken[0]
    assert spoken[1].startswith("step 20 ") and "one 0.002" in spoken[1]
    quiet(browser)


def test_hover_tells_exact_values(browser, runs, tmp_path):
    show(browser, tmp_path, runs["one"])
    text = js(
        browser,
        "const s = $('#chart-val_bits_per_byte svg') || $('#chart-bits-per-byte svg'), b = s.getBoundingClientRect();"
        "s.dispatchEvent(new PointerEvent('pointermove', {clientX: b.right - 16, clientY: b.top + 50}));"
        "return $('#tip').textContent",
    )
    last = browser.execute_script("return RUNS[0].series.val_bits_per_byte.y.at(-1)")
    assert text.startswith("step 600") and f"validation{last}" in text
    quiet(browser)


def test_axis_switch(browser, runs, tmp_path):
    show(browser, tmp_path, runs["one"])
    ticks = "return [...document.querySelectorAll('#chart-lr text.tick[text-anchor=middle]')].map(t => t.textContent)"
    seen = {}
    for axis in ("tokens", "seconds", "step"):
        browser.find_element("css selector", f"input[value={axis}] + span").click()
        assert js(browser, "return $('#chart-loss').dataset.axis") == axis
        seen[axis] = js(browser, ticks)
        assert points(browser) == POINTS
    assert (
        seen["step"][-1] == "600"
        and seen["tokens"][-1].endswith("M")
        and seen["seconds"][-1].endswith("s")
    )
    quiet(browser)


def test_ticks_are_whole_where_things_are_counted_and_alike_on_an_axis(browser, runs, tmp_path):
    show(browser, tmp_path, runs["one"])
    assert js(browser, "return ticks(0, 19, 8, 'step')") == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]
    assert js(browser, "return ticks(0, 23, 9, 'step')") == [0, 5, 10, 15, 20]
    assert js(browser, "return ticks(0, 0.5, 4, 'experts')") == [0]
    rates = js(browser, "const t = [0, 0.0005, 0.001, 0.0015]; return t.map(tickText(t))")
    assert rates == ["0", "0.0005", "0.001", "0.0015"]
    tiny = js(browser, "const t = [0, 0.0002, 0.0004]; return t.map(tickText(t))")
    assert tiny == ["0", "2e-4", "4e-4"]
    quiet(browser)


def test_drag_zooms_and_double_click_undoes_it(browser, runs, tmp_path):
    show(browser, tmp_path, runs["one"])
    drag = (
        "const s = $('#chart-lr svg'), b = s.getBoundingClientRect(), at = (f) => ({clientX: b.left + b.width * f,"
        " clientY: b.top + 60, pointerType: 'mouse', button: 0, buttons: 1});"
        "s.dispatchEvent(new PointerEvent('pointerdown', at(0.5))); s.dispatchEvent(new PointerEvent('pointermove', at(0.6)));"
        "s.dispatchEvent(new PointerEvent('pointerup', at(0.7)));"
    )
    first = "return Number([...document.querySelectorAll('#chart-lr text.tick[text-anchor=middle]')][0].textContent)"
    js(browser, drag)
    assert js(browser, first) > 200
    js(browser, "$('#chart-lr svg').dispatchEvent(new MouseEvent('dblclick'))")
    assert js(browser, first) == 0
    quiet(browser)


def test_slider_moves_the_heat_map(browser, runs, tmp_path):
    show(browser, tmp_path, runs["one"])
    state = "const f = $('#chart-load').dataset; return [f.frames, f.step, Number(f.dead), $('.heat-bar output').textContent]"
    paths = "return [...document.querySelectorAll('#chart-load path.cells')].map(p => p.getAttribute('d')).join()"
    frames, step, dead, text = js(browser, state)
    assert (frames, step, dead) == ("60", "600", 0) and text.startswith("step 600 ·")
    before = js(browser, paths)
    cursor = js(browser, "return $('#chart-load-strip line.cursor').getAttribute('x1')")
    js(browser, "const s = $('#heat-step'); s.value = 0; s.dispatchEvent(new Event('input'))")
    assert js(browser, state)[1] == "10"
    assert js(browser, paths) != before
    assert float(
        js(browser, "return $('#chart-load-strip line.cursor').getAttribute('x1')")
    ) < float(cursor)
    # Dead experts of the first interval: recorded, counted, drawn and crossed out.
    recorded = browser.execute_script(
        "return RUNS[0].load.frames[0].flat(2).filter(v => v === 0).length"
    )
    drawn = js(
        browser, "return $('#chart-load path.cells.dead').getAttribute('d').match(/M/g).length"
    )
    crosses = js(
        browser, "return $('#chart-load .plot path.crosses').getAttribute('d').match(/M/g).length"
    )
    assert recorded > 0 and js(browser, state)[2] == recorded == drawn and crosses == 2 * recorded
    quiet(browser)


def test_dark_by_preference_and_by_button(browser, runs, tmp_path):
    paper = "return getComputedStyle(document.body).backgroundColor"
    cell = "return getComputedStyle($('#chart-load path.cells')).fill"
    light = "rgb(246, 246, 243)"
    try:
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": "dark"}]},
        )
        show(browser, tmp_path, runs["one"])
        assert js(browser, paper) == "rgb(20, 22, 26)"
        dark_cell = js(browser, cell)
        browser.find_element("id", "theme").click()
        assert js(browser, paper) == light
        assert js(browser, cell) != dark_cell
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": "light"}]},
        )
        show(browser, tmp_path, runs["one"])
        assert js(browser, paper) == light
        browser.find_element("id", "theme").click()
        assert js(browser, paper) == "rgb(20, 22, 26)"
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    quiet(browser)


def test_runs_overlay_and_toggle(browser, runs, tmp_path):
    show(browser, tmp_path, runs["one"], runs["two"], runs["dense"])
    both = points(browser)
    assert both["loss"] == 3 * 69 and both["lr"] == 3 * 60 and both["dead"] == 2 * 60
    assert both["load"] == LAYERS * HEADS * EXPERTS  # the map shows one run
    assert js(browser, "return $('#ranking').textContent").startswith("Ranked by validation bits")
    browser.find_element("css selector", ".runs button[data-run='1']").click()
    assert points(browser)["loss"] == 2 * 69
    assert js(browser, "return document.querySelectorAll('#chart-lr path.line').length") == 2
    browser.find_element("css selector", ".runs button[data-run='1']").click()
    assert points(browser) == both
    js(browser, "const s = $('#routing-run'); s.value = '1'; s.dispatchEvent(new Event('change'))")
    assert points(browser)["load"] == 2 * HEADS * 16 and points(browser)["entropy"] == 2 * 60
    js(browser, "const s = $('#routing-run'); s.value = '2'; s.dispatchEvent(new Event('change'))")
    assert points(browser)["load"] == 0
    assert "this run is dense" in js(browser, "return $('#chart-load .none').textContent")
    assert "this run is dense" in js(browser, "return $('#chart-entropy .none').textContent")
    shown = js(
        browser,
        "return [...document.querySelectorAll('#config-table tbody tr:not([hidden])')].map(r => r.dataset.key)",
    )
    assert {"optim.lr", "run.seed", "model.moe.n_experts"} <= set(
        shown
    ) and "optim.beta1" not in shown
    quiet(browser)


def test_dense_run_says_so(browser, runs, tmp_path):
    show(browser, tmp_path, runs["dense"])
    assert points(browser)["load"] == 0
    assert "No expert load was recorded: this run is dense" in js(
        browser, "return $('#routing').textContent"
    )
    assert (
        js(
            browser,
            "return document.querySelectorAll('#routing svg.hot, #routing .plot svg').length",
        )
        == 0
    )
    quiet(browser)


def test_config_search(browser, runs, tmp_path):
    show(browser, tmp_path, runs["one"])
    js(
        browser,
        "const s = $('#config-search'); s.value = 'moe top_k'; s.dispatchEvent(new Event('input'))",
    )
    shown = js(
        browser,
        "return [...document.querySelectorAll('#config-table tbody tr:not([hidden])')].map(r => r.dataset.key)",
    )
    assert sorted(shown) == ["model.moe.router.top_k_groups", "model.moe.top_k"]
    quiet(browser)


def test_hostile_text_is_inert(browser, runs, tmp_path):
    show(browser, tmp_path, runs["hostile"])
    assert js(browser, "return window.broken === undefined")
    assert (
        js(browser, "return document.querySelectorAll('img, body i, body script').length") == 2
    )  # the page's own two
    shown = js(browser, "return $('#samples-list pre').textContent")
    assert "</script><script>window.broken = 1</script>" in shown
    assert js(browser, "return $('h1').textContent") == "<i>hostile"
    quiet(browser)


def test_tables_hold_the_points(browser, runs, tmp_path):
    show(browser, tmp_path, runs["one"])
    js(browser, "$('#chart-lr details').open = true; $('#chart-load details').open = true")
    browser.execute_async_script("setTimeout(arguments[0], 50)")
    assert js(browser, "return document.querySelectorAll('#chart-lr tbody tr').length") == 60
    assert (
        js(browser, "return document.querySelectorAll('#chart-load tbody tr').length")
        == LAYERS * HEADS
    )
    quiet(browser)


@pytest.mark.parametrize("width", [320, 760, 1600])
def test_nothing_is_wider_than_the_window(browser, runs, tmp_path, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        show(browser, tmp_path, runs["one"], runs["two"])
        assert js(browser, "return document.documentElement.scrollWidth") <= width
        assert points(browser)["load"] == POINTS["load"]
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    quiet(browser)


def test_a_run_without_steps_opens(browser, runs, tmp_path):
    folder = make_run(tmp_path / "new", steps=10)
    (folder / "metrics.jsonl").write_text("")
    show(browser, tmp_path, folder)
    assert set(points(browser).values()) == {0}
    assert "no step recorded yet" in js(browser, "return $('#headline').textContent")
    quiet(browser)
