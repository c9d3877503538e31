"""A real Chromium without a network, and runs to show: two trained ones, and one of hostile names and model output."""

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aid.report_runs import HOSTILE, odd_data, write_results, write_run
from playwright.sync_api import Browser, Page, sync_playwright

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
sys.path.insert(0, str(SAMPLES / "study"))

from figures import launch  # noqa: E402

DEMO = SAMPLES / "demo"


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()


@dataclass
class Opened:
    """A page and all that it did which a report must not do."""

    page: Page
    wrong: list[str] = field(default_factory=list)


@pytest.fixture
def show(chromium: Browser) -> Iterator[Any]:
    """Opens a file as a reader does; the test fails for any request, dialog, error or refused script."""
    opened: list[Opened] = []

    def open_page(path: Path, *, width: int = 1280, height: int = 900, **options: Any) -> Page:
        context = chromium.new_context(viewport={"width": width, "height": height}, offline=True, **options)
        found = Opened(context.new_page())
        opened.append(found)
        wrong, page = found.wrong, found.page
        page.on("console", lambda message: wrong.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda r: None if r.url == path.as_uri() else wrong.append(f"request: {r.url[:200]}"))
        page.on("popup", lambda popup: wrong.append(f"popup: {popup.url}"))
        page.goto(path.as_uri())
        page.locator("html[data-ready=true]").wait_for(state="attached", timeout=60_000)
        return page

    yield open_page
    for each in opened:
        each.page.context.close()
        assert each.wrong == []


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 groups of 1 expert and 3 self responses, by the demo model."""
    from gftdata.config import GenerateConfig, validate_config
    from gftdata.generate import generate

    out = tmp_path_factory.mktemp("data") / "data"
    rows = (DEMO / "train.jsonl").read_text().splitlines()[:16]
    (prompts := out.parent / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    settings = {
        "model": str(DEMO / "model"),
        "out": str(out),
        "prompts": {"path": str(prompts), "columns": {"ground_truth": "answer", "expert": "expert"}},
        "reward": {"name": "numeric", "workers": 1},
        "responses": {"max_tokens": 48, "self": {"count": 3}},
        "engine": {"device": "cpu"},
    }
    generate(validate_config(GenerateConfig, settings, "test"))
    return out


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, data: Path) -> list[Path]:
    """Two runs of gft train, three steps each, with results; and the results of the base model."""
    from gftdata.config import validate_config
    from gfttrain.config import TrainConfig
    from gfttrain.train import train

    folder = tmp_path_factory.mktemp("runs")
    for name, objective in {"gft": {}, "sft": {"sources": ["expert"], "advantage": "one", "tau": 0.0}}.items():
        settings = {
            "model": str(DEMO / "model"),
            "data": str(data),
            "out": str(folder / name),
            "objective": objective,
            "optim": {"lr": 1e-3},
            "batch": {"groups_per_step": 6},
            "device": "cpu",
        }
        train(validate_config(TrainConfig, settings, "test"))
    write_results(folder / "gft", 0.6)
    write_results(folder / "sft", 0.31)
    write_results(folder / "base", 0.5)
    return [folder / name for name in ("base", "sft", "gft")]


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory, data: Path) -> list[Path]:
    """Runs, metrics, settings, benchmarks, prompts and tokens that would all like to be markup."""
    from gfttrain.metrics import append_line

    folder = tmp_path_factory.mktemp("hostile")
    groups = odd_data(data, folder / "data", HOSTILE, [100_000, len(HOSTILE), 3 * len(HOSTILE), 1])
    made = []
    for name in ("<a href='javascript:alert(1)'>run<", "<img src=x onerror=alert(2)> %{x} &lt;i&gt;", "\u202enur"):
        run = write_results(write_run(folder / name, groups), 0.4, "<script>alert('benchmark')</script>")
        write_results(run, 0.2, "__proto__")
        shutil.copy(groups / "model" / "tokenizer.json", run / "final" / "tokenizer.json")
        names = [*(f"<b>{text[:200]}" for text in HOSTILE), *(() if made else ("__proto__", "constructor"))]
        append_line(run / "metrics.jsonl", {"step": 6, **dict.fromkeys(names, 1.0)})
        settings = json.loads((run / "run.json").read_text())
        settings["config"]["<script>alert(3)</script>"] = HOSTILE[len(made)]
        (run / "run.json").write_text(json.dumps(settings))
        made.append(run)
    return made
