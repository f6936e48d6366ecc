"""The routing report in a real browser: what it shows equals an independent recount from the routers' own outputs.

Chromium is told to keep to itself; the page's own policy forbids it to load anything.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.recipe import save_model, words
from tests.support.report import choices_of, recipe, save_run

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[2]
E, K, HIDDEN, SAMPLE, ROW = 8, 2, 32, 48, 64
EP = {"zero1_ep2": 2, "zero2_ep8": 8, "zero3_ep4": 4, "zero3": 1}
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,900"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    driver.set_page_load_timeout(30)
    yield driver
    driver.quit()


class Page:
    """What a reader does with the page and sees on it."""

    def __init__(self, driver: Any, file: Path) -> None:
        self.driver = driver
        driver.get_log("browser")  # of an earlier page
        driver.get(file.as_uri())

    def text(self, selector: str) -> str:
        return str(self.driver.execute_script("return document.querySelector(arguments[0]).textContent", selector))

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((element) => element.textContent)"
        return list(self.driver.execute_script(script, selector))

    def labels(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((element) => element.ariaLabel)"
        return list(self.driver.execute_script(script, selector))

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def click(self, selector: str) -> None:
        self.find(selector).click()

    def choose(self, name: str, value: str) -> None:
        from selenium.webdriver.support.ui import Select

        Select(self.find(f"#{name}")).select_by_value(value)

    def numbers(self, selector: str) -> list[float]:
        return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*(?:\.\d+)?", self.text(selector))]

    def told_badly(self) -> list[Any]:
        """What the console says, and what was loaded: nothing, if all is well."""
        loaded = self.driver.execute_script("return performance.getEntriesByType('resource').map((one) => one.name)")
        return self.driver.get_log("browser") + loaded


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A page about a tiny model, with what plain transformers says about the same tokens."""
    folder = tmp_path_factory.mktemp("page")
    checkpoint = save_model(folder / "model", num_local_experts=E, num_experts_per_tok=K)
    (folder / "text.txt").write_text(text := words(600, seed=3))
    steps = save_run(folder / "run", [1, 2, 3, 4], layers=2, experts=E, ep_size=2)
    file = recipe()["write_report"](checkpoint, folder / "text.txt", run=folder / "run")[0]
    ids = [int(word[1:]) for word in text.split()]
    rows = [ids[start : start + ROW] for start in range(0, len(ids), ROW)]
    config = json.loads((checkpoint / "config.json").read_text())
    seen = choices_of(checkpoint, rows)
    return {"file": file, "words": text.split(), "seen": seen, "steps": steps, "config": config}


@pytest.fixture
def page(browser: Any, made: dict[str, Any]) -> Iterator[Page]:
    opened = Page(browser, made["file"])
    yield opened
    assert opened.told_badly() == []


def recount(seen: Any, sample: int, layer: int, ep: int, world: int) -> dict[str, Any]:
    """Where the copies of a sample go; written down from the definition, not from the page's code."""
    crossing, received = 0, [0] * world
    for t, experts in enumerate(seen[layer][sample][:SAMPLE]):
        rank = t // (SAMPLE // world)
        for expert in experts:
            home = rank - rank % ep + expert // (E // ep)
            crossing += home != rank
            received[home] += 1
    return {"crossing": crossing, "received": received, "slowdown": max(received) * world / sum(received)}


def rank_slowdown(seen: Any, ep: int) -> float:
    """Fullest EP rank over the mean of one layer, all tokens."""
    ranks = Counter(expert // (E // ep) for row in seen for token in row for expert in token)
    return max(ranks.values()) * ep / sum(ranks.values())


def check_batch(
    page: Page, made: dict[str, Any], sample: int, layer: int, ep: int, world: int, value_bytes: int
) -> None:
    expected = recount(made["seen"], sample, layer, ep, world)
    assert page.texts("#batch bdi") == made["words"][sample * ROW : sample * ROW + SAMPLE]
    assert page.numbers("#copies") == [SAMPLE * K]
    assert page.numbers("#crossing")[0] == expected["crossing"]
    sent = expected["crossing"] * HIDDEN * value_bytes
    assert page.text("#bytes") == (f"{sent} B" if sent < 1000 else f"{sent / 1000:.1f} kB")
    assert page.numbers("#slowdown") == [pytest.approx(expected["slowdown"], abs=0.0051)]
    assert [int(text.split()[0]) for text in page.texts("#grid .got")] == expected["received"]
    assert len(page.texts("#picture .line.crosses")) == expected["crossing"]
    assert len(page.texts("#picture .line")) == SAMPLE * K


def test_routing_equals_a_recount_in_every_layer_layout_and_sample(page: Page, made: dict[str, Any]) -> None:
    count = len(made["seen"][0]) - 1  # the last row is too short for a sample
    assert page.text("#which") == f"sample 1 of {count}, {SAMPLE} tokens"
    page.choose("layout", "zero1_ep2.json")
    page.choose("world", "8")
    check_batch(page, made, 0, 0, ep=2, world=8, value_bytes=2)
    for sample in (1, 2):
        page.click("#route")
        check_batch(page, made, sample, 0, ep=2, world=8, value_bytes=2)
    page.choose("layer", "1")
    check_batch(page, made, 2, 1, ep=2, world=8, value_bytes=2)
    for name, world in (("zero2_ep8", 8), ("zero3_ep4", 16), ("zero3_ep4", 4), ("zero3", 2)):
        page.choose("layout", f"{name}.json")
        page.choose("world", str(world))
        check_batch(page, made, 2, 1, EP[name], world, value_bytes=2)
    for _ in range(count - 2):
        page.click("#route")
    check_batch(page, made, 0, 1, ep=1, world=2, value_bytes=2)  # all the way round


def replica_bytes(preset: str, config: dict[str, Any]) -> str:
    """What the planner counts for the experts of one layer on 4 GPUs: gradients reduced and weights gathered."""
    from moe_models.config.ds_config import load_ds_config
    from moe_models.config.work import Work
    from moe_models.families.model import Model
    from moe_models.planner.case import Case
    from moe_models.planner.traffic import traffic

    ds = load_ds_config(ROOT / "ds_configs" / f"{preset}.json")
    if preset == "zero3":  # gathers small tensors once and keeps them; here every one counts twice
        ds.raw["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    work = Work(micro_batch=1, length=32, recompute=False)
    case = Case.of(ds, Model.of(config), 4, work, 4)
    layers = case.sizes.moe_layers
    sent = sum(flow.sent for flow in traffic(case) if "experts" in flow.what)
    if preset == "zero3":  # the planner counts the experts' gradients with all others
        (gradients,) = (flow for flow in traffic(case) if flow.what.startswith("gradients"))
        sent += gradients.sent * case.sizes.expert_params // (case.sizes.expert_params + case.sizes.dense_params)
    return f"{sent / layers / 1000:.1f} kB" if sent else "0 B"


def test_layouts_are_compared_on_the_same_batch(page: Page, made: dict[str, Any]) -> None:
    page.choose("layout", "zero1_ep2.json")
    page.choose("world", "4")
    rows = {row.split(",")[0]: n for n, row in enumerate(page.texts("#compare tbody th"))}
    shown = {}
    for name, n in rows.items():
        shown[name] = page.texts(f"#compare tbody tr:nth-child({n + 1}) td")
    for name, ep in (("zero1_ep2", 2), ("zero1_ep4", 4), ("zero3", 1)):
        expected = recount(made["seen"], 0, 0, ep, 4)
        assert shown[name][:3] == [
            f"{ep} \N{MULTIPLICATION SIGN} {4 // ep}",
            str(E // ep),
            f"{expected['crossing']} of {SAMPLE * K}",
        ]
        assert shown[name][3] == replica_bytes(name, made["config"])
        assert float(shown[name][4]) == pytest.approx(expected["slowdown"], abs=0.0051)
        assert float(shown[name][5]) == pytest.approx(rank_slowdown(made["seen"][0], ep), abs=0.0051)
    assert shown["zero1_ep8"] == ["not on 4 GPUs"]


def test_stages_are_stepped_through_by_button_and_by_keyboard(page: Page, made: dict[str, Any]) -> None:
    from selenium.webdriver.common.keys import Keys

    page.choose("layout", "zero1_ep4.json")
    page.choose("world", "4")
    expected = recount(made["seen"], 0, 0, 4, 4)
    words_of = {
        "route": f"{SAMPLE} tokens become {SAMPLE * K} copies",
        "dispatch": f"First all-to-all: {expected['crossing']} of {SAMPLE * K} copies leave",
        "compute": f"got {max(expected['received'])} copies where {SAMPLE * K // 4} would be even",
        "combine": f"Second all-to-all: the same {expected['crossing']} copies travel back",
    }
    for stage in [*words_of, "route"]:
        assert words_of[stage] in page.text("#told")
        assert page.find("#picture").get_attribute("data-stage") == stage
        assert page.find(f"#stages [value={stage}]").is_selected()
        page.click("#step")
    page.find("#stages [value=dispatch]").send_keys(Keys.ARROW_RIGHT)
    assert words_of["compute"] in page.text("#told")
    page.click("#route")
    assert page.find("#stages [value=route]").is_selected()
    page.choose("layout", "zero1_ep4_native.json")
    page.click("#step")
    tokens = made["seen"][0][1][:SAMPLE]
    most = max(Counter((t // 12, expert) for t, experts in enumerate(tokens) for expert in experts).values())
    assert f"buffers for {4 * (E - E // 4) * most} copies cross" in page.text("#told")


def test_tokens_and_experts_tell_by_pointer_and_by_keyboard(page: Page, made: dict[str, Any]) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    page.choose("layout", "zero1_ep2.json")
    page.choose("world", "2")
    for t, (label, experts) in enumerate(zip(page.labels(".token"), made["seen"][0][0], strict=False)):
        rank = t // 24
        heavy_first = sorted(experts.items(), key=lambda pair: -pair[1])
        told = ", ".join(
            f"expert {e} at {w:.2f} (GPU {e // 4}, {'stays' if e // 4 == rank else 'crosses'})" for e, w in heavy_first
        )
        shown = re.sub(r"at (\d\.\d\d)", lambda found: f"at {float(found[1]):.2f}", label)
        assert re.sub(r"0\.\d\d", "#", shown) == re.sub(
            r"0\.\d\d", "#", f"Token “{made['words'][t]}” on GPU {rank}: {told}."
        )
        weights = [float(number) for number in re.findall(r"at (\d\.\d\d)", label)]
        assert weights == pytest.approx([w for _, w in heavy_first], abs=0.0075)  # 8 bits and two digits
    assert page.text("#detail") == ""
    first, second = page.labels(".token")[:2]
    page.driver.execute_script("document.querySelector('.token').focus()")
    assert page.text("#detail") == first
    page.driver.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    assert page.text("#detail") == second
    assert len(page.texts(".line.on")) == K
    page.driver.switch_to.active_element.send_keys(Keys.TAB)
    assert page.text("#detail") == page.labels(".expert")[0]
    page.driver.switch_to.active_element.send_keys(Keys.END)
    assert page.text("#detail") == page.labels(".expert")[-1]
    got = [expert for token in made["seen"][0][0][:SAMPLE] for expert in token].count(E - 1)
    assert page.text("#detail").startswith(f"Expert {E - 1} on GPU 1: {got} cop")
    page.driver.switch_to.active_element.send_keys(Keys.SHIFT, Keys.TAB)
    assert page.text("#detail") == second, "the list remembers its place"
    ActionChains(page.driver).move_to_element(page.find(".token:nth-child(5) text")).perform()
    assert page.text("#detail") == page.labels(".token")[4]
    page.driver.execute_script("document.activeElement.blur()")
    ActionChains(page.driver).move_to_element(page.find("h1")).perform()
    assert page.text("#detail") == ""


def test_loads_top_tokens_and_training_are_those_of_the_layer(page: Page, made: dict[str, Any]) -> None:
    from selenium.webdriver.common.keys import Keys

    page.choose("layout", "zero1_ep2.json")
    for layer in (0, 1):
        page.choose("layer", str(layer))
        load = Counter(expert for row in made["seen"][layer] for token in row for expert in token)
        cells = page.texts("#load-table tbody td")
        assert cells[0::4] == [str(e) for e in range(E)]
        assert cells[1::4] == [str(e // 4) for e in range(E)]
        assert [int(text.replace(",", "")) for text in cells[2::4]] == [load[e] for e in range(E)]
        told = f"At EP 2 the fullest rank has {rank_slowdown(made['seen'][layer], 2):.2f} times the mean"
        assert told in page.text("#load-told")
        slowdowns = [rank_slowdown(layer_seen, 2) for layer_seen in made["seen"]]
        overall = f"Over all layers: {sum(slowdowns) / 2:.2f} on average, {max(slowdowns):.2f} in layer"
        assert overall in page.text("#load-told")
        tokens = Counter(made["words"])
        flat = [token for row in made["seen"][layer] for token in row]
        for card, expert in zip(page.driver.find_elements("css selector", "#top article"), range(E), strict=True):
            pairs = zip(made["words"], flat, strict=True)
            times = Counter(word for word, experts in pairs if expert in experts)
            lines = [line.text.split() for line in card.find_elements("css selector", "li")]
            assert lines
            for word, seen, of, total in [(line[0], line[-3], line[-2], line[-1]) for line in lines]:
                assert (int(seen), of, int(total)) == (times[word], "of", tokens[word])
        page.driver.execute_script("document.querySelector('#steps-map canvas').focus()")
        page.driver.switch_to.active_element.send_keys(Keys.ARROW_DOWN, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
        at = made["steps"][2][layer]
        ratio = page.numbers("#steps-map .readout")[-1]
        assert page.text("#steps-map .readout").startswith("step 3, expert 1: ")
        assert ratio == pytest.approx(at[1] * E / sum(at), abs=1 / 32)
    page.driver.execute_script("document.querySelector('#layers-map canvas').focus()")
    page.driver.switch_to.active_element.send_keys(Keys.ARROW_UP, Keys.ENTER)
    assert page.find("#layer").get_attribute("value") == "0"


def test_one_expert_parallel_group_can_be_looked_at_alone(page: Page, made: dict[str, Any]) -> None:
    page.choose("layout", "zero1_ep2.json")
    page.choose("world", "8")
    page.choose("group", "3")
    tokens = made["seen"][0][0][36:48]
    crossing = sum(e // 4 != t // 6 for t, experts in enumerate(tokens) for e in experts)
    assert page.numbers("#copies") == [24]
    assert page.numbers("#crossing")[0] == crossing
    assert page.texts(".band-title") == ["GPU 6", "experts 0\N{EN DASH}3", "GPU 7", "experts 4\N{EN DASH}7"]


@pytest.mark.parametrize(("width", "dark", "still"), [(1440, False, True), (390, True, False)])
def test_the_page_fits_its_window_and_can_be_read(page: Page, width: int, dark: bool, still: bool) -> None:
    command = page.driver.execute_cdp_cmd
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    command("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    motion = {"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"}
    command("Emulation.setEmulatedMedia", {"features": [scheme, motion]})
    try:
        page.driver.refresh()
        assert page.driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        for name, against in (
            ("--ink", "--card"),
            ("--soft", "--band"),
            ("--on-accent", "--accent"),
            ("--warn", "--card"),
        ):
            assert contrast(page, name, against) >= 4.5, (name, against)
        page.click("#step")
        script = "return getComputedStyle(document.querySelector('.crosses')).animationName"
        assert page.driver.execute_script(script) == ("none" if still else "travel")
        unnamed = "select:not(label select), button:empty, input:not(label input), [role=img]:not([aria-label])"
        assert page.texts(unnamed) == []
    finally:
        command("Emulation.clearDeviceMetricsOverride", {})
        command("Emulation.setEmulatedMedia", {"features": []})


def contrast(page: Page, *names: str) -> float:
    """WCAG 2 contrast of two colours of the style sheet."""
    lights = []
    for name in names:
        value = page.driver.execute_script(
            "return getComputedStyle(document.documentElement).getPropertyValue(arguments[0])", name
        )
        digits = value.strip().lstrip("#")
        digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
        parts = [int(digits[n : n + 2], 16) / 255 for n in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)
