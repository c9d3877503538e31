"""benchmarks/train_vs_trl.py as far as it goes without TRL, with the demo's model. `make test-interchange` has both."""

from collections.abc import Callable


def test_our_side_prints_its_rows(benchmark: Callable[..., list[str]]) -> None:
    lines = benchmark("train_vs_trl.py", "--smoke", "--ours-only", "--responses", "2", "--zero", "60", "--steps", "3")
    row = next(line for line in lines if line.startswith("16/8 x 2  gft train"))
    median, low, high = (float(part.strip("()")) for part in row.split("gft train")[1].replace("to", " ").split()[:3])
    assert 0 < low <= median <= high
    memory, first_step = (float(cell) for cell in row.split(")")[1].split()[:2])
    assert 0.2 < memory < 4 and first_step > 0.5
    assert next(line for line in lines if line.startswith("16/8 x 2 ") and "60 %" in line)
