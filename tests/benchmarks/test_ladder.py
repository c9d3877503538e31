"""benchmarks/ladder.py with the demo's model: every rung does the same update, and the table is printed."""

import argparse
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def ladder(module: Callable[[str], ModuleType]) -> ModuleType:
    return module("ladder")


def test_every_rung_does_the_same_update_and_computes_less(
    ladder: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gfttrain import stream

    model = str(ROOT / "samples/demo/model")
    ladder.write_data(tmp_path, model, ladder.Shape(24, 8, 4, 2), [50], 2)
    options = argparse.Namespace(model=model, groups=2, steps=2, micro_batch_tokens=105)
    real, made = stream.collate, []

    def collate(*arguments: object) -> stream.Batch:
        made.append(real(*arguments))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(stream, "collate", collate)
    runs, computed = {}, {}
    for rung in ladder.RUNGS:
        made.clear()
        found = ladder.climb(options, str(tmp_path / "zero-50"), rung)
        runs[rung.name] = [ladder.Run(*found.values(), 1.0)]
        ladder.check_same(rung.name, runs[rung.name][0], "plain", runs["plain"][0])
        warmed = made[0].input_ids_BL.numel()  # the first micro-batch, before the clock
        computed[rung.name] = (len(made), sum(batch.input_ids_BL.numel() for batch in made) - warmed)
    # two steps of two groups, one of them without signal: 4, 7, 9 and 12 tokens without the last, after a prompt of 24
    assert computed["plain"][0] == 1 + 2 * 8 and computed["micro-batches"][0] == 1 + 2 * 3
    singly, shared = 2 * 2 * (4 * 24 + 28), 2 * 2 * (24 + 28)
    assert [positions for _, positions in computed.values()][2:] == [singly, singly, shared, shared // 2, shared // 2]
    assert computed["plain"][1] == singly and computed["micro-batches"][1] == 2 * (3 * 35 + 3 * 32 + 2 * 27)
    ladder.print_ladder(runs, 64)
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[1:]] == list(runs)


def test_another_update_ends_the_program(ladder: ModuleType) -> None:
    def run(loss: float, norm: float) -> object:
        return ladder.Run([1.0], [0.0], [loss], [0.5], [norm], 1.0)

    one = run(1e-5, 2.0)  # its tokens' losses, of a mean size of 0.5, have almost cancelled
    ladder.check_same("packing", run(4e-5, 2.0001), "plain", one)
    for loss, norm in ((1e-4, 2.0), (1e-5, 2.001), (float("nan"), 2.0)):
        with pytest.raises(SystemExit, match="not the same work: step 1: "):
            ladder.check_same("packing", run(loss, norm), "plain", one)


def test_the_ladder_with_gft_train_at_its_top(benchmark: Callable[..., list[str]]) -> None:
    lines = benchmark("ladder.py", "--smoke", "--rungs", "read-ahead", "gft train")
    assert lines[0].startswith(
        "model, 2 groups of 4 responses, prompt/response 24/8, 50 % of the groups without signal"
    )
    assert [line.split("  ")[0] for line in lines[3:5]] == ["read-ahead", "gft train"]
