"""benchmarks/stream.py as it stands, on a hundredth of a gigabyte."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_stream_benchmark_prints_its_tables_and_removes_its_shards(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/stream.py", "--gigabytes", "0.01", "--plan-groups", "500"]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line]
    assert lines[0] == "python benchmarks/stream.py --gigabytes 0.01 --plan-groups 500"
    gigabytes, _, groups, tokens = lines[2].split()[:4]
    assert 0.002 < float(gigabytes) < 0.02 and groups == "256"
    assert 500_000 < int(tokens.replace(",", "")) < 256 * 8 * 600
    assert lines[2].endswith("1.000")
    assert lines[3].startswith("planning 500 groups of 8 responses, 8 steps") and "layout_totals" in lines[4]
    assert not list(tmp_path.iterdir())
