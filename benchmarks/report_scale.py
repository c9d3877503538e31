"""`gft report` over many long runs: seconds, bytes and peak memory of the command itself.

    python benchmarks/report_scale.py                       # 20 runs of 10,000 steps, required: under 20 s and 6 MB
    python benchmarks/report_scale.py --runs 5 --steps 100000

The runs' metrics are synthetic, with every key that a GFT run on three sources has and a spike in each run; the groups
are those of a data set made by the demo's model. Every spike is looked for on the page.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from measure import ROOT, print_end

sys.path.insert(0, str(ROOT / "tests"))

from aid.report_runs import metrics_of, write_results, write_run

SPIKE = 123456.0


def make_data(folder: Path) -> Path:
    """32 groups of 1 expert and 7 self responses."""
    from gftdata.config import GenerateConfig, load_config
    from gftdata.generate import generate

    sample = ROOT / "samples" / "demo"
    (folder / "prompts.jsonl").write_text("\n".join((sample / "train.jsonl").read_text().splitlines()[:32]) + "\n")
    places = {
        "model": str(sample / "model"),
        "out": str(folder / "data"),
        "prompts.path": str(folder / "prompts.jsonl"),
    }
    generate(load_config(GenerateConfig, sample / "generate.yaml", values=places))
    return folder / "data"


def make_run(out: Path, data: Path, steps: int, seed: int) -> int:
    """A run with noise on every metric and one spike in its gradient norm; returns the step of the spike."""
    run = write_results(write_run(out, data, steps=0, seed=seed), 0.3 + 0.01 * seed)
    rng = np.random.default_rng(seed)
    spike = int(rng.integers(2, steps))
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            noise = float(rng.normal(1.0, 0.2))
            report = {k: v * noise if isinstance(v, float) else v for k, v in metrics_of(step, seed).items()}
            report["grad_norm"] = SPIKE if step == spike else report["grad_norm"]
            file.write(json.dumps(report) + "\n")
    return spike


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--keep", type=Path, help="Put the page here.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = make_data(root)
        names = [root / f"run-{n:02d}" for n in range(given.runs)]
        spikes = [make_run(name, data, given.steps, n) for n, name in enumerate(names)]
        size = sum((name / "metrics.jsonl").stat().st_size for name in names)
        command = [sys.executable, "-m", "gftcli.main", "report", *map(str, names), "--out", str(root / "report.html")]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - began
        after = resource.getrusage(resource.RUSAGE_CHILDREN)  # of our largest child: the judges are smaller
        work = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        page = (root / "report.html").read_text()
        if given.keep:
            given.keep.write_text(page)
        found = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
        assert found is not None
        shown = json.loads(found[1])
        kept = 0
        for series, spike in zip(shown["series"], spikes, strict=True):
            curve = series["grad_norm"]
            kept += SPIKE in curve["y"] and int(np.cumsum(curve["x"])[curve["y"].index(SPIKE)]) == spike
    print(f"\n{given.runs} runs of {given.steps:,} steps, {size / 1e6:,.0f} MB of metrics")
    print(f"seconds        {seconds:8.1f}")
    print(f"CPU seconds    {work:8.1f}")
    print(f"page, MB       {len(page.encode()) / 1e6:8.2f}")
    print(f"peak RSS, MB   {after.ru_maxrss / 1024:8,.0f}")
    print(f"spikes shown   {kept:5d} of {given.runs}")
    print_end("numpy")


if __name__ == "__main__":
    main()
