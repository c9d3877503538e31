"""samples/rounds as it stands, with fewer prompts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gftdata.manifest import read_manifest
from gftdata.shards import verify
from gfttrain.results import read_results

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_two_rounds(tmp_path: Path) -> None:
    out = tmp_path / "rounds"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["sh", "samples/rounds/rounds.sh", "2", str(out), "--set", "prompts.limit=24"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = read_manifest(out / "0" / "data"), read_manifest(out / "1" / "data")
    assert verify(out / "0" / "data") == verify(out / "1" / "data") == []
    assert first.summary.groups == second.summary.groups == 24
    reference = {manifest.models[0].revision for manifest in (first, second)}
    assert len(reference) == 2, "the second round's reference is the model that the first one trained"
    texts = [[s.responses for s in m.summary.sources if s.source == "expert"] for m in (first, second)]
    assert texts[0] == texts[1] == [24]
    results = read_results(out / "1" / "train")
    assert 0 < results["sums"].pass_at[1].value <= 1 and {"subtraction", "reversal"} < results.keys()
