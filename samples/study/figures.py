"""The study's figures: pages of `gft report` over its runs, photographed. benchmarks/STUDY.md shows them.

    sh tests/browser/install.sh                                                     # Chromium, once
    python samples/study/study.py --only ablation rounds weak --seeds 1 --jobs 2    # the runs: seed 0
    python samples/study/figures.py                                                 # into benchmarks/figures

The pages themselves stay in OUT, to look at: report-<figure>.html.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from playwright.sync_api import Browser, Playwright, sync_playwright  # noqa: E402
from questions import EVERY  # noqa: E402
from study import SCALES, Study  # noqa: E402

from gfttrain.report import Options, write_report  # noqa: E402

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH = 1180  # of the window


@dataclass(frozen=True, slots=True)
class Figure:
    """Runs of some conditions, and which of the charts of training."""

    name: str
    conditions: tuple[str, ...]
    charts: tuple[str, ...]


FIGURES = (
    Figure(
        "study-ablation",
        ("SFT", "GFT w/o GAL", "GFT w/o DCR", "GFT", "positives"),
        ("Gradient norm", "KL and log-ratio by source"),
    ),
    Figure(
        "study-weak",
        ("GFT, weak-2", "RFT, weak-2", "GFT, weak-3", "RFT, weak-3", "GFT, weak-4", "RFT, weak-4"),
        ("Evaluation during training", "Entropy"),
    ),
)
SHOW_ONLY = """titles => {
    const curves = document.querySelector("#curves");
    for (const figure of curves.querySelectorAll("figure"))
        if (!titles.includes(figure.querySelector("h3").textContent)) figure.remove();
    curves.style.padding = "1rem";
}"""


def launch(playwright: Playwright) -> Browser:
    """The Chromium that is installed here; ends the program where none is."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        sys.exit("no Chromium: sh tests/browser/install.sh")
    return playwright.chromium.launch(executable_path=found, args=["--no-sandbox"] if os.getuid() == 0 else [])


def photograph(browser: Browser, runs: list[Path], charts: Sequence[str], html: Path, photo: Path) -> None:
    """Write a report of these runs, and a picture of some of its charts with the legend that they share."""
    write_report(runs, html, Options(groups=0))
    page = browser.new_page(viewport={"width": WIDTH, "height": 900})
    page.goto(html.absolute().as_uri())
    page.locator("html[data-ready=true]").wait_for(state="attached")
    if missing := set(charts) - set(page.locator("#curves figure h3").all_inner_texts()):
        sys.exit(f"{html} has no chart {', '.join(sorted(missing))}")
    page.evaluate(SHOW_ONLY, list(charts))
    page.locator("#curves").screenshot(path=photo)
    page.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="of the study")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figures", type=Path, default=HERE.parents[1] / "benchmarks" / "figures")
    options = parser.parse_args()
    study = Study(SCALES["toy"], options.out, None)
    options.figures.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = launch(playwright)
        for figure in FIGURES:
            runs = [study.run(EVERY[name], options.seed) for name in figure.conditions]
            html = options.out / f"report-{figure.name.removeprefix('study-')}.html"
            photo = options.figures / f"{figure.name}.png"
            photograph(browser, runs, figure.charts, html, photo)
            print(f"{photo}: {len(runs)} runs of seed {options.seed}, from {html}")
        browser.close()


if __name__ == "__main__":
    main()
