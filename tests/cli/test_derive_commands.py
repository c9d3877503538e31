"""`gft rejudge`, `rescore`, `merge`, `filter` and `split` as a user meets them."""

import json
from pathlib import Path

import pytest
import yaml
from aid.commands import Gft, tree

DEMO = Path(__file__).resolve().parents[2] / "samples" / "demo"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 groups of an expert's and three self responses, in 3 shards."""
    from gftdata.config import GenerateConfig, validate_config
    from gftdata.generate import generate

    folder = tmp_path_factory.mktemp("made") / "data"
    settings = {
        "model": str(DEMO / "model"),
        "out": str(folder),
        "prompts": {
            "path": str(DEMO / "train.jsonl"),
            "columns": {"ground_truth": "answer", "expert": "expert"},
            "limit": 10,
        },
        "reward": {"name": "numeric", "workers": 1},
        "responses": {"self": {"count": 3}, "max_tokens": 26},
        "engine": {"device": "cpu"},
        "shards": {"groups_per_shard": 4, "row_group_size": 2},
    }
    generate(validate_config(GenerateConfig, settings, "test"))
    return folder


def done(gft: Gft, *arguments: str | Path, saying: tuple[str, ...] = ()) -> str:
    """The command, first with --dry-run, which writes nothing, then as it is; its output."""
    before = tree(Path.cwd())
    planned = gft(*arguments, "--dry-run")
    assert planned.code == 0, planned.err
    assert "(nothing was written)" in planned.out
    assert tree(Path.cwd()) == before
    made = gft(*arguments)
    assert made.code == 0, made.err
    for words in saying:
        assert words in planned.out and words in made.out, (words, planned.out, made.out)
    return made.out


def refused(gft: Gft, *arguments: str | Path, saying: tuple[str, ...]) -> None:
    """The command ends with one clear line and exit code 2, and has written nothing."""
    before = tree(Path.cwd())
    result = gft(*arguments)
    assert result.code == 2, result
    lines = result.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.err
    for words in saying:
        assert words in lines[0], lines[0]
    assert tree(Path.cwd()) == before


def test_the_whole_way_from_one_data_set_to_another(gft: Gft, data: Path, tmp_path: Path) -> None:
    before = tree(data)
    out = done(gft, "rejudge", data, "--out", "judged", "--reward", "exact", "--set", "reward.workers=1")
    assert "expert" in out and "without signal" in out
    out = done(gft, "rescore", data, "--out", "scored", "--model", DEMO / "model", "--set", "engine.device=cpu")
    assert "10 groups in 3 shards" in gft("validate", "scored").out.replace("\n", " ")
    summary = json.loads((data / "manifest.json").read_text())["summary"]
    kept = done(gft, "filter", "scored", "--out", "kept", "--min-pass", "0.3", "--max-pass", "0.7", "--source", "self")
    share = [line for line in kept.splitlines() if line.startswith("kept")]
    assert len(share) == 1 and "%" in share[0]
    assert "with a pass rate above 0.7" in kept
    out = done(gft, "split", "scored", "--out-a", "a", "--out-b", "b", "--share", "0.3", "--groups-per-shard", "2")
    assert out.count("read ") == 2 and "on the other side" in out
    done(gft, "merge", "a", "b", "--out", "both", saying=("10 groups of a, b", "10 groups (100.0%)"))
    merged = json.loads((tmp_path / "both" / "manifest.json").read_text())
    assert merged["summary"]["response_tokens"] == summary["response_tokens"]
    assert [step["by"] for step in merged["derived"]] == ["rescore", "split", "rescore", "split", "merge"]
    for folder in ("judged", "scored", "kept", "a", "b", "both"):
        assert gft("validate", folder).code == 0, folder
    (tmp_path / "train.yaml").write_text(
        yaml.safe_dump({"model": str(DEMO / "model"), "data": "both", "out": "run", "batch": {"groups_per_step": 5}})
    )
    planned = gft("train", "train.yaml", "--dry-run")
    assert planned.code == 0 and "2 of 5 groups" in planned.out, planned
    assert tree(data) == before


def test_a_finished_command_given_again_does_nothing(gft: Gft, data: Path, tmp_path: Path) -> None:
    arguments = ("filter", data, "--out", "new", "--with-signal")
    assert gft(*arguments).code == 0
    before = tree(tmp_path)
    again = gft(*arguments)
    assert again.code == 0, again.err
    assert tree(tmp_path) == before
    refused(gft, *arguments, "--min-pass", "0.2", saying=("`min_pass` was 0.0 and is now 0.2",))


def test_a_stopped_rejudging_says_that_it_continues(
    gft: Gft, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from gftdata import shards

    publish, calls = shards.publish_shard, 0

    def stop_at_second(*arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        publish(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(shards, "publish_shard", stop_at_second)
    arguments = ("rejudge", data, "--out", "new", "--reward", "exact")
    assert gft(*arguments).code == 130
    refused(gft, "filter", "new", "--out", "other", saying=("an unfinished data set",))
    assert "3, 1 of them published already" in gft(*arguments, "--dry-run").out
    continued = gft(*arguments)
    assert continued.code == 0 and "continuing: 4 of 10 groups are there already" in continued.out
    assert gft("validate", "new").code == 0


def test_mistakes_end_in_one_line(gft: Gft, data: Path, tmp_path: Path) -> None:
    rejudge = ("rejudge", data, "--out", "new", "--reward")
    refused(gft, *rejudge, "numerik", saying=("did you mean 'numeric'",))
    refused(gft, *rejudge, "exact", "--set", "reward.timeout=3", saying=("did you mean `timeout_s`",))
    refused(gft, *rejudge, "exact", "--set", "reward.timeout_s=-3", saying=("gft rejudge", "reward.timeout_s"))
    refused(gft, *rejudge, "exact", "--set", "timeout", saying=("expected key=value",))
    refused(gft, *rejudge, "exact", "--set", "reward.timeout_s={", saying=("not valid YAML",))
    rescore = ("rescore", data, "--out", "new", "--model")
    refused(gft, *rescore, "./no-model", saying=("no-model",))
    refused(gft, *rescore, DEMO / "model", "--set", "engine.name=vllm", saying=("engine.name", "sglang"))
    bare = "engine={name: sglang, python: no-such-python}"
    refused(gft, *rescore, DEMO / "model", "--set", bare, saying=("no-such-python",))
    refused(gft, "merge", data, data, "--out", "new", saying=("10 of 20 groups", "--duplicates first"))
    refused(gft, "merge", data, "none", "--out", "new", saying=("none: no such data set folder",))
    filtered = ("filter", data, "--out", "new")
    refused(gft, *filtered, "--source", "teacher:x", saying=("teacher:x", "expert, self"))
    refused(gft, *filtered, "--min-pass", "0.9", "--max-pass", "0.1", saying=("from 0.9 to 0.1",))
    split = ("split", data, "--out-a", "new", "--share")
    refused(gft, *split, "1.5", "--out-b", "b", saying=("--share 1.5",))
    refused(gft, *split, "0.5", "--out-b", "new", saying=("two folders",))
