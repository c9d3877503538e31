"""The report in a real browser: drawn, true to its files, usable by keyboard, on a phone, in the dark, and safe."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from aid.report_runs import HOSTILE, write_run
from playwright.sync_api import Page, expect

from gfttrain.examples import read_examples
from gfttrain.html_page import visible
from gfttrain.objective import rectified_coefficient
from gfttrain.report import Options, write_report


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, runs: list[Path]) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    assert not write_report(runs, out, Options(groups=4, score=True)).missing
    return out


@pytest.fixture(scope="module")
def hostile_report(tmp_path_factory: pytest.TempPathFactory, hostile: list[Path]) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    write_report(hostile, out, Options(groups=2))
    return out


def row_of(page: Page, region: str, run: str) -> list[str]:
    """The cells of a run in one of the tables."""
    table = page.get_by_role("region", name=region, exact=True)
    expect(table).to_be_visible()  # a table is made when its details are opened
    row = table.locator("tbody tr").filter(has=page.get_by_role("rowheader", name=run, exact=True))
    return [text.strip() for text in row.locator("td").all_inner_texts()]


def no_overflow(page: Page) -> None:
    page.evaluate("() => window.scrollTo(1e6, 0)")
    assert page.evaluate("() => [window.scrollX, document.documentElement.scrollWidth - window.innerWidth]") == [0, 0]


def test_every_chart_is_drawn(show: Any, report: Path):
    page = show(report)
    plots = page.locator(".plot")
    assert plots.count() == len(page.locator("figure").all()) >= 10
    for plot in plots.all():
        assert plot.locator("svg.main-svg").count() >= 1
        assert plot.locator(".scatterlayer .trace, .barlayer .trace").count() >= 1
        assert len(plot.get_attribute("aria-label") or "") > 20
    # a line for each of two trained runs, with a point for each of three steps
    loss = page.locator("figure", has_text="Loss").first
    paths = loss.locator(".scatterlayer .trace path.js-line")
    assert paths.count() == 2
    assert all((path.get_attribute("d") or "").count("L") == 2 for path in paths.all())


def test_numbers_are_those_of_the_files(show: Any, report: Path, runs: list[Path]):
    page = show(report)
    for run in runs[1:]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for title, key in [("Gradient norm", "grad_norm"), ("Tokens per second", "tokens_per_second")]:
            figure = page.locator("figure", has=page.get_by_role("heading", name=title, exact=True))
            if not figure.locator("details[open]").count():
                figure.locator("summary").click()
            cells = row_of(page, key, run.name)
            values = [line[key] for line in lines]
            assert [cells[0], cells[1]] == [str(len(lines)), "0"]
            for cell, step, value in [
                (cells[2], cells[3], (values[0], 1)),
                (cells[4], cells[5], (values[-1], len(lines))),
                (cells[6], cells[7], (min(values), 1 + values.index(min(values)))),
                (cells[8], cells[9], (max(values), 1 + values.index(max(values)))),
            ]:
                assert float(cell) == pytest.approx(value[0], rel=1e-5) and int(step) == value[1]
    best = page.get_by_role("region", name="sums", exact=True).locator("td.best")
    assert best.count() == 5 and best.first.inner_text().startswith("0.600")
    base = row_of(page, "sums", "base")
    assert base[0].startswith("0.500") and base[2].startswith("0.600") and base[3].startswith("0.511")
    assert base[5:-1] == ["0.2134", "0.0456", "13.25", "3.1 %", "0"] and base[-1].split()[::2] == ["64", "4"]
    assert row_of(page, "Runs and their settings", "base")[1] == "not trained here"


def test_weights_are_those_of_the_file(show: Any, report: Path, runs: list[Path]):
    page = show(report)
    lines = [json.loads(line) for line in (runs[2] / "metrics.jsonl").read_text().splitlines()]
    section = page.locator("#weights")
    section.locator("summary").click()

    def counts() -> list[list[int]]:
        expect(section.locator("tbody tr")).to_have_count(16)
        rows = section.locator("tbody tr").all()
        return [[int(cell.replace(",", "")) for cell in row.locator("td").all_inner_texts()] for row in rows]

    both = [np.array([line[key] for line in lines]) for key in ("weights_before", "weights_after")]
    assert section.get_by_role("combobox").locator("option:checked").inner_text() == "gft"
    assert counts() == np.stack([part.sum(0) for part in both], 1).tolist()
    slider = section.get_by_role("slider")
    slider.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == "step 2"
    assert counts() == np.stack([part[1] for part in both], 1).tolist()


def test_tokens_show_their_numbers_by_keyboard_and_pointer(show: Any, report: Path, data: Path, runs: list[Path]):
    page = show(report)
    examples = read_examples([str(data)], 4)
    responses = examples.groups[0].responses
    cards = page.locator("#groups .response")
    assert cards.count() == len(responses)
    inspector = page.locator("#inspector")
    for card, response in zip(cards.all(), responses, strict=True):
        coefficients = rectified_coefficient(torch.from_numpy(response.ref_logprobs), 0.7).numpy()
        held = 100 * float((coefficients < 1).mean())
        assert card.locator(".share-held").inner_text() == f"{held:.1f} %"
        assert card.locator(".t").count() == len(response.completion.response_ids)
        shaded = [token.evaluate("t => t.style.getPropertyValue('--a') !== ''") for token in card.locator(".t").all()]
        assert shaded == (coefficients < 1).tolist()

    # from the picker of the run on, Tab comes to the tokens
    page.locator("#groups").get_by_role("combobox").focus()
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("() => document.activeElement.className").startswith("t"):
            break
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    first = responses[0]
    logprob = float(first.ref_logprobs[2])
    coefficient = math.exp(logprob) if math.exp(logprob) < 0.7 else 1.0
    expect(inspector).to_contain_text("token 3 of ")
    said = inspector.inner_text()
    assert f"id {first.completion.response_ids[2]}" in re.sub(r"\s+", " ", said)
    facts = dict(re.findall(r"(log π_ref|C\(π_ref\)|π_ref|log π|C\(π\)) (\S+)", re.sub(r"\s+", " ", said)))
    assert float(facts["log π_ref"]) == pytest.approx(logprob, abs=5e-5)
    assert float(facts["C(π_ref)"]) == pytest.approx(coefficient, rel=1e-3)
    assert "C(π)" in facts and "log π" in facts
    page.keyboard.press("End")
    expect(inspector).to_contain_text("<eos>")

    cards.last.locator(".t").first.hover()
    expect(inspector).to_contain_text(f"token 1 of {len(responses[-1].completion.response_ids)}")
    # the other run uses the expert's response alone
    page.locator("#groups").get_by_role("combobox").select_option(label="sft")
    expect(cards.last.locator("header")).to_contain_text("not used by this run's objective")
    page.get_by_role("radio", name="log π_ref").check()
    expect(page.locator("#groups")).to_have_class("by-logprob")
    page.get_by_role("button", name="next →").click()
    expect(page.locator("#groups")).to_contain_text("Group 2 of 4")


def test_controls_work_by_keyboard(show: Any, report: Path):
    page = show(report)
    loss = page.locator("figure", has=page.get_by_role("heading", name="Loss", exact=True))
    lines = loss.locator(".scatterlayer .trace path.js-line")
    box = page.locator("#curves").get_by_role("checkbox", name="sft")
    box.focus()
    page.keyboard.press("Space")
    expect(lines).to_have_count(1)
    # the copy of the control beside the other chart says the same
    expect(page.locator("#passk").get_by_role("checkbox", name="sft")).not_to_be_checked()
    page.keyboard.press("Space")
    expect(lines).to_have_count(2)
    page.get_by_role("combobox", name="Smoothing").select_option(index=3)
    expect(lines).to_have_count(4)
    page.get_by_label("Last step shown").fill("2")
    page.keyboard.press("Tab")
    expect(loss.locator(".xtick").last).to_have_text("2")
    # whatever has the focus shows it
    outline = "() => getComputedStyle(document.activeElement).outlineStyle"
    page.locator("#theme").focus()
    for _ in range(25):
        page.keyboard.press("Tab")
        assert page.evaluate(outline) != "none"


def test_dark_and_light(show: Any, report: Path):
    background = "() => getComputedStyle(document.body).backgroundColor"
    ink = "() => getComputedStyle(document.querySelector('.plot .xtick text')).fill"
    page = show(report, color_scheme="dark")
    dark, dark_ink = page.evaluate(background), page.evaluate(ink)
    button = page.locator("#theme")
    button.click()
    expect(button).to_have_text("Colours: light")
    light, light_ink = page.evaluate(background), page.evaluate(ink)
    assert dark != light and dark_ink != light_ink
    button.click()
    assert page.evaluate(background) == dark and page.evaluate(ink) == dark_ink
    page.emulate_media(color_scheme="light")
    button.click()
    expect(button).to_have_text("Colours: system")
    assert page.evaluate(background) == light


@pytest.mark.parametrize("which", ["report", "hostile_report"])
@pytest.mark.parametrize("width", [380, 1280])
def test_the_page_never_scrolls_sideways(request: pytest.FixtureRequest, show: Any, which: str, width: int):
    page = show(request.getfixturevalue(which), width=width, height=800, has_touch=width == 380)
    no_overflow(page)
    for summary in page.locator("summary").all():
        summary.click()
    no_overflow(page)
    page.locator(".t").first.click()
    no_overflow(page)


def test_hostile_text_is_text(show: Any, hostile_report: Path, report: Path):
    page = show(hostile_report)
    for summary in page.locator("summary").all():
        summary.click()
    for control in page.locator("figcaption select").all():
        for option in range(control.locator("option").count()):
            control.select_option(index=option)
    body = page.locator("body")
    assert page.locator("img, iframe, object, embed, form, base, link, meta[http-equiv=refresh]").count() == 0
    assert page.locator("script").count() == 3 and page.locator("style").count() <= 2
    links = [link.get_attribute("href") for link in page.locator("a").all()]
    assert all(link is not None and re.fullmatch("#[a-z]+", link) for link in links)
    assert page.locator("[onerror], [onclick], [onload]").count() == 0
    # readable as it is, with what steers named
    text = body.inner_text()
    for name in ("<a href='javascript:alert(1)'>run<", "<img src=x onerror=alert(2)> %{x} &lt;i&gt;", "⟨U+202E⟩nur"):
        assert name in text
    tokens = page.locator("#groups .response").nth(1).locator(".t").all_inner_texts()
    assert len(tokens) == len(HOSTILE)
    for shown, sent in zip(tokens, HOSTILE, strict=True):
        assert shown == visible(sent, 200)
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00\x1b]", page.content())
    assert "W… (1,000,000 characters)" in text or "(1,000,000 characters)" in tokens[13]
    expect(page.locator("#groups .response").first).to_contain_text("more tokens are not in this page")

    # what plotly writes itself: hover labels, axis titles
    plot = page.locator("#curves .plot").first
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    assert box is not None
    for part in range(1, 10):
        page.mouse.move(box["x"] + box["width"] * part / 10, box["y"] + box["height"] / 2)
    hovered = plot.locator(".hovertext")
    if hovered.count():
        assert plot.locator(".hovertext a, .hovertext b").count() == 0
    assert page.locator("svg a").count() == 0


def test_names_in_hover_labels_are_text(show: Any, hostile_report: Path):
    page = show(hostile_report)
    plot = page.locator("#passk .plot")
    plot.scroll_into_view_if_needed()
    point = plot.locator(".scatterlayer .trace path.point").first.bounding_box()
    assert point is not None
    page.mouse.move(point["x"] + point["width"] / 2, point["y"] + point["height"] / 2)
    label = plot.locator(".hovertext")
    expect(label).to_be_visible()
    assert re.search(r"<a href=|<img src=|nur", label.text_content() or "")
    assert label.locator("a, b, i, img").count() == 0


def test_one_run_and_twenty(show: Any, tmp_path: Path, runs: list[Path]):
    write_report(runs[2:], tmp_path / "one.html")
    page = show(tmp_path / "one.html")
    assert page.locator("figure").first.locator(".trace").count() >= 1
    expect(page.locator("#runs")).to_contain_text("One run")
    many = [write_run(tmp_path / f"run-{n:02d}", None, steps=30, seed=n) for n in range(20)]
    write_report(many, tmp_path / "many.html")
    page = show(tmp_path / "many.html")
    lines = page.locator("#curves figure").first.locator(".trace path.js-line")
    assert lines.count() == 20
    looks = {
        line.evaluate("l => { const s = getComputedStyle(l); return `${s.stroke} ${s.strokeDasharray}` }")
        for line in lines.all()
    }
    assert len(looks) == 20
    no_overflow(page)
