"""benchmarks/inspect_scale.py as it stands, on a few groups."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_inspect_benchmark_prints_its_table_and_removes_its_shards(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/inspect_scale.py", "--groups", "600", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line]
    assert lines[0] == "python benchmarks/inspect_scale.py --groups 600"
    assert lines[1].startswith("768 groups, 6,144 responses, 3 shards, ")
    assert [line.split("  ")[0] for line in lines[3:]] == [
        "gft inspect DATA",
        "gft inspect DATA --json",
        "gft inspect DATA --model samples/demo/model",
    ]
    for line in lines[3:]:
        seconds, cpu_seconds, megabytes = map(float, line.split()[-3:])
        assert seconds > 0 and cpu_seconds > 0 and 50 < megabytes < 4000
    assert not list(tmp_path.iterdir())
