"""plan --html: the page's figures are those of the planner, of layout and of traffic; in a real browser, offline."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_models.families.adapters import adapter_sizes
from moe_models.families.model import Model
from moe_models.planner.devices import GIB
from moe_models.planner.figures import memory_cells, times_of
from moe_models.planner.pipeline import pipeline_traffic
from moe_models.planner.search import ORDER, Plan
from moe_models.report import page as pages
from moe_models.report.plans import MIB, gpus_axis, grid, layouts_of, plan_data
from tests.recipes.test_plan import REQUEST, replace
from tests.report import test_routing_report_page
from tests.report.test_routing_report_page import Page
from tests.support.layouts import MIXTRAL_8X7B, plan, plan_search

browser = test_routing_report_page.browser
HOSTILE = "</script><img src=x onerror=window.hit=1>\u202e@@data@@"


@pytest.fixture(scope="module")
def planned() -> tuple[Any, list[Plan], dict[str, Any]]:
    """A plan on two nodes with tensor or sequence parallelism in it, and what the page gets."""
    request = replace(REQUEST, gpus=16, batch=64)
    plans = plan_search.search(request)
    return request, plans, plan_data(request, plans, 8, "Mixtral")


def cell(data: dict[str, Any], name: str, gpus: int, length: int, micro: int, recompute: bool) -> Any:
    """The predictions of one place of the sliders."""
    axes = data["axes"]
    world = next(one for one in data["layouts"] if one["name"] == name)["worlds"][axes["gpus"].index(gpus)]
    place = (axes["lengths"].index(length) * len(axes["micro"]) + axes["micro"].index(micro)) * 2 + recompute
    return world["cells"][place]


def test_each_plan_is_in_the_page_as_it_was_predicted(planned: Any) -> None:
    request, plans, data = planned
    seen = 0
    fields = times_of(one.case for one in layouts_of(plans))
    assert list(fields.values()) == data["times"]
    names = [one["name"] for one in data["layouts"]]
    for one in plans:
        if one.name not in names:
            continue
        work = one.case.work
        found = cell(data, one.name, request.gpus, work.length, work.micro_batch, work.recompute)
        assert found["acc"] == work.accumulation
        row = found["at"][data["axes"]["skews"].index(request.skew)]
        memory, time = one.prediction.memory, one.prediction.time
        assert row[0] == ORDER[one.verdict]
        assert row[1:9] == [round(getattr(memory, part) / MIB) for part in plan.PARTS]
        assert row[9:-1] == [round(1e4 * getattr(time, part)) for part in fields]
        flows = [(*data["kinds"][kind], size, sent, bool(across)) for kind, size, sent, across in found["flows"]]
        assert flows == [(f.what, f.collective, f.group, f.size, f.sent, f.across) for f in pipeline_traffic(one.case)]
        seen += 1
    assert seen >= len(names) == 10


def test_the_grid_is_that_of_the_layout() -> None:
    case = next(one.case for one in plan_search.search(REQUEST) if one.case.ds.ep_size == 4)
    ds = plan_search.build(1, 4, 2, 1, "")
    case = replace(REQUEST, gpus=32).case(ds, case.work)
    found = grid(case)
    assert found["title"] == case.layout.describe(1)
    assert found["dimensions"] == ["dp", "ep", "edp", "tp"]
    assert [rank for rank, *_ in found["ranks"]] == list(range(32)), "four nodes: the first three and the last"
    for rank, node, first, held, places in found["ranks"]:
        at = case.layout.coordinates(rank)
        assert (node, places) == (rank // 8, [at.dp, at.ep, at.edp, at.tp])
        assert range(first, first + held) == case.layout.experts_of(rank, 8)
    large = grid(replace(REQUEST, gpus=1024).case(ds, case.work))
    assert {node for _, node, *_ in large["ranks"]} == {0, 1, 2, 127}


@pytest.mark.parametrize(("gpus", "per_node"), [(1, 8), (12, 6), (1000, 8)])
def test_odd_numbers_of_gpus(gpus: int, per_node: int) -> None:
    """A page for any number; one that does not divide the batch of all sizes has no place in that line."""
    config = {**MIXTRAL_8X7B, "num_hidden_layers": 4}
    request = replace(
        REQUEST, model=Model.of(config), gpus=gpus, gpus_per_node=min(gpus, per_node), batch=4 * gpus, length=512
    )
    data = plan_data(request, plan_search.search(request), per_node, "odd")
    place = data["axes"]["gpus"].index(gpus)
    assert data["layouts"][0]["worlds"][place]["cells"]
    assert (data["layouts"][0]["one_batch"][place] is None) == (gpus == 1000)
    assert data["one_batch"] <= 4096


def test_an_adapter_has_no_recomputation_under_zero_3() -> None:
    """As the preflight says; below it both are there."""
    config = {**MIXTRAL_8X7B, "num_hidden_layers": 4}
    model = Model.of(config)
    adapter = adapter_sizes(model.sizes, model.family, config, 16, None, None)
    request = replace(REQUEST, model=model, adapter=adapter, length=512)
    data = plan_data(request, plan_search.search(request), 8, "adapter")
    for one in data["layouts"]:
        recomputed = [place for place in one["worlds"][0]["cells"][1::2] if place is not None]
        assert bool(recomputed) == (not one["name"].startswith("ZeRO-3")), one["name"]


def test_axes() -> None:
    assert gpus_axis(8, 8) == [8, 16, 32, 64, 128, 256, 512, 1024]
    assert gpus_axis(2, 8)[0] == 2
    assert gpus_axis(24, 8) == [8, 16, 24, 32, 64, 128, 256, 512, 1024]
    assert gpus_axis(12, 6) == [12], "no power of two is a whole number of nodes of 6"


def test_one_batch_is_the_same_at_all_sizes(planned: Any) -> None:
    _, _, data = planned
    assert data["one_batch"] == 1024
    for one in data["layouts"]:
        for gpus, world, row in zip(data["axes"]["gpus"], one["worlds"], one["one_batch"], strict=True):
            if row is not None:
                assert row[0] * row[1] * gpus // world["split"] == 1024


def test_it_can_be_sent_by_mail_and_loads_nothing(planned: Any) -> None:
    """About 1 MB, and nothing in it comes from elsewhere."""
    text = pages.assemble({**planned[2], "model": HOSTILE}, HOSTILE, pages.PLAN)
    assert len(text.encode()) < 1_500_000
    assert "default-src 'none'" in text
    assert not re.search(r"(src|href)=\"?(https?:)?//", text)
    assert "<img" not in text
    body, data = text.split('<script type="application/json" id="data">')
    assert json.loads(data.split("</script>")[0])["model"] == HOSTILE
    assert body.count("<script") == 0


# --- in a browser


@pytest.fixture(scope="module")
def file(planned: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.html"
    path.write_text(pages.assemble(planned[2], "Plan", pages.PLAN), encoding="utf-8")
    return path


@pytest.fixture
def page(browser: Any, file: Path) -> Iterator[Page]:
    opened = Page(browser, file)
    yield opened
    assert opened.told_badly() == []


def slide(page: Page, axis: str, place: int) -> None:
    page.driver.execute_script(
        "const one = document.getElementById(arguments[0]); one.value = arguments[1];"
        "one.dispatchEvent(new Event('input'))",
        axis,
        place,
    )


@pytest.mark.browser
def test_the_list_is_that_of_the_terminal(page: Page, planned: Any) -> None:
    """The order, the batch, the verdict and every figure of the first layouts, as recipes/plan.py prints them."""
    _, plans, data = planned
    by_name: dict[str, Plan] = {}
    for one in plans:
        by_name.setdefault(one.name, one)
    cells = "[...row.children].map((cell) => cell.textContent)"
    script = f"return [...document.querySelectorAll('#numbers tbody tr')].map((row) => {cells})"
    rows = page.driver.execute_script(script)
    assert len(rows) == len(data["layouts"])
    assert [row[0] for row in rows[:5]] == list(by_name)[:5]
    columns = plan.TIMES | plan.STAGES
    for row in rows:
        one = by_name[row[0]]
        prediction = one.prediction
        assert row[1:4] == [plan.batch_of(one), "yes" if one.case.work.recompute else "no", one.verdict]
        parts = [float(text) for text in row[4:12]]
        assert parts == pytest.approx([float(text) for text in memory_cells(prediction.memory)], abs=0.101)
        assert float(row[12]) == pytest.approx(prediction.memory.needed / GIB, abs=0.06)
        assert float(row[13]) == pytest.approx(prediction.host.peak / GIB, abs=1.01)
        milliseconds = [float(text.replace(",", "")) for text in row[14:20]]
        assert milliseconds == pytest.approx(
            [float(text.replace(",", "")) for text in plan.time_cells(one, columns)], abs=1.01
        )
        assert float(row[20].replace(",", "")) == pytest.approx(prediction.tokens_per_s, rel=0.002)
    first = page.text("#layouts .layout strong")
    assert first.startswith(rows[0][0])


@pytest.mark.browser
def test_hours_and_cost_are_those_of_the_terminal(browser: Any, planned: Any, tmp_path: Path) -> None:
    request, plans, data = planned
    path = tmp_path / "plan.html"
    run = {"tokens": 1e9, "price": 2.5}
    path.write_text(pages.assemble({**data, "run": run}, "Plan", pages.PLAN), encoding="utf-8")
    opened = Page(browser, path)
    hours, _, cost = plan.run_cells(plans[0], request, 1e9, 2.5)
    shown = opened.text("#layouts .speed small")
    told = re.fullmatch(r"([\d.,]+) hours, ([\d,]+)", shown)
    assert told is not None
    assert float(told[1].replace(",", "")) == pytest.approx(float(hours.replace(",", "")), abs=0.11)
    assert float(told[2].replace(",", "")) == pytest.approx(float(cost.replace(",", "")), rel=0.01)
    assert "1.00 billion tokens, a GPU hour costs 2.5." in opened.text("#notes")
    assert opened.told_badly() == []


@pytest.mark.browser
def test_sliders_and_choices(page: Page, planned: Any) -> None:
    _, _, data = planned
    before = page.text("#told")
    slide(page, "gpus", len(data["axes"]["gpus"]) - 1)
    assert page.text("#gpus-told") == "1,024"
    assert "tokens a second on 1,024 GPUs" in page.text("#told") != before
    assert "125 more nodes" not in page.text("#grid")
    assert "124 more nodes like these" in page.text("#grid")
    slide(page, "micro", 1)
    assert all(text.startswith("1 \N{MULTIPLICATION SIGN} ") for text in page.texts("#layouts strong small"))
    slide(page, "gpus", data["axes"]["gpus"].index(16))
    slide(page, "micro", 0)
    page.driver.execute_script("document.querySelectorAll('#layouts input')[1].click()")
    chosen = page.driver.execute_script("return Number(document.querySelector('#layouts :checked').value)")
    told = page.text("#grid-told")
    assert told.startswith(data["layouts"][chosen]["worlds"][data["axes"]["gpus"].index(16)]["grid"]["title"])
    # 16 GPUs are two nodes: the sums of the page are those of traffic.
    sums = page.texts("#wire .amount")
    assert sums
    assert page.text("#wire-told").startswith("A rank sends ")
    page.driver.execute_script("document.querySelector('.gpu').click()")
    assert page.text("#rank-told").startswith("GPU 0: expert")
    page.driver.execute_script("document.querySelector('[name=dimension][value=dp]').click()")
    assert page.text("#dimension-told").startswith("DP: a rank reads data of its own")
    one = page.text("#scale-told")
    page.driver.execute_script("document.querySelector('[name=batch][value=each]').click()")
    assert page.text("#scale-told") != one
    assert "whatever the sliders say" in one


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (820, True), (390, False)])
def test_it_fits_its_window(page: Page, width: int, dark: bool) -> None:
    command = page.driver.execute_cdp_cmd
    command(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    command("Emulation.setEmulatedMedia", {"features": [scheme]})
    try:
        page.driver.refresh()
        assert page.driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        assert (
            page.texts("select:not(label select), button:empty, input:not(label input), [role=img]:not([aria-label])")
            == []
        )
        script = (
            "return [...document.querySelectorAll('main svg')]"
            ".every((one) => one.getBoundingClientRect().right <= innerWidth)"
        )
        assert page.driver.execute_script(script)
    finally:
        command("Emulation.clearDeviceMetricsOverride", {})
        command("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.browser
def test_hostile_names_are_text(browser: Any, planned: Any, tmp_path: Path) -> None:
    from moe_models.report.text import visible

    data = {**planned[2], "model": visible(HOSTILE), "measured": [HOSTILE], "model_type": HOSTILE, "device": HOSTILE}
    path = tmp_path / "plan.html"
    path.write_text(pages.assemble(data, HOSTILE, pages.PLAN), encoding="utf-8")
    opened = Page(browser, path)
    assert opened.driver.execute_script("return [typeof window.hit, document.images.length]") == ["undefined", 0]
    assert "<img src=x" in opened.text("#about")
    assert opened.told_badly() == []


def test_the_recipe_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**MIXTRAL_8X7B, "num_hidden_layers": 2}))
    words = ["--model_name_or_path", tmp_path, "--gpus", 2, "--device", "h200", "--seq_length", 512]
    assert plan.main([*map(str, words), "--html", str(tmp_path / "plan.html")]) == 0
    assert (tmp_path / "plan.html").read_text().startswith("<!doctype html>")
    assert f"written: {tmp_path}/plan.html" in "".join(capsys.readouterr().out.splitlines())
