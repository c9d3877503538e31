"""throughput.py on the embedded engine as it stands, in a small size: all three sides do the same work."""

from collections.abc import Callable


def test_three_sides_do_the_same_and_are_measured(benchmark: Callable[..., list[str]]) -> None:
    lines = benchmark("throughput.py", "--pairs", "1", "--prompts", "6", "--samples", "2", "--tokens", "12")
    assert lines[0].startswith("round 1: gft generate ")
    for line, name in zip(lines[1:3], ("gft generate", "datasets.map"), strict=True):
        assert line.startswith(f"  {name}: 12 responses, pass rate ")
        assert float(line.split(" within ")[1].split()[0]) <= 1e-4
    names = [line[:12] for line in lines[4:7]]
    assert names == ["gft generate", "bare engine ", "datasets.map"]
    assert [line.count(" to ") for line in lines[4:7]] == [2, 3, 3]
