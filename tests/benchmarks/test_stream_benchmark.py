"""benchmarks/stream.py as it stands, on a hundredth of a gigabyte."""

from collections.abc import Callable
from pathlib import Path


def test_the_stream_benchmark_prints_its_tables_and_removes_its_shards(
    benchmark: Callable[..., list[str]], tmp_path: Path
) -> None:
    lines = benchmark("stream.py", "--gigabytes", "0.01", "--plan-groups", "500", "--folder", str(tmp_path))
    gigabytes, _, groups, tokens = lines[1].split()[:4]
    assert 0.002 < float(gigabytes) < 0.02 and groups == "256"
    assert 500_000 < int(tokens.replace(",", "")) < 256 * 8 * 600
    assert lines[1].endswith("1.000")
    assert lines[2].startswith("planning 500 groups of 8 responses, 8 steps") and "layout_totals" in lines[3]
    assert not list(tmp_path.iterdir())
