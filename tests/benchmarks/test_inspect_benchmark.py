"""benchmarks/inspect_scale.py as it stands, on a few groups."""

from collections.abc import Callable
from pathlib import Path


def test_the_inspect_benchmark_prints_its_table_and_removes_its_shards(
    benchmark: Callable[..., list[str]], tmp_path: Path
) -> None:
    lines = benchmark("inspect_scale.py", "--groups", "600", "--folder", str(tmp_path))
    assert lines[0].startswith("768 groups, 6,144 responses, 3 shards, ")
    assert [line.split("  ")[0] for line in lines[2:5]] == [
        "gft inspect DATA",
        "gft inspect DATA --json",
        "gft inspect DATA --model samples/demo/model",
    ]
    for line in lines[2:5]:
        seconds, cpu_seconds, megabytes = map(float, line.split()[-3:])
        assert seconds > 0 and cpu_seconds > 0 and 50 < megabytes < 4000
    assert not list(tmp_path.iterdir())
