"""The commands that are broken on purpose: what each is given, what it leaves behind, and when that is right.

A command's work has parts, such as shards and the manifest. A part is there as it is in a run that nothing disturbed,
or it is not there; and where the last part is there, all are.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from aid.fake_hub import WRITE, FakeHub, Repo
from aid.injector import MODEL, ROOT, Fault, How, Warm, build

from gftdata.config import recipe_differences
from gfttrain.results import read_results

Parts = dict[str, Any]
DEMO = ROOT / "samples" / "demo"
REPO = "someone/sums"
TIMES = ("seconds", "tokens_per_second", "data_wait_fraction")


@dataclass(frozen=True)
class Command:
    """`gft` with these words, and what is there of its work."""

    words: tuple[str | Path, ...]
    parts: Callable[[], Parts]
    last: str
    progress: Callable[[], int] | None = None  # what is safe of it, as a number; default: how many parts
    before: Parts = field(default_factory=dict)  # what was there before, and may be until the end
    constants: tuple[tuple[str, str, Any], ...] = ()  # of the program, that are others here
    refuses: str = ""  # what it says when it is given again after its end, if it does


@dataclass(frozen=True)
class World:
    """What all commands of a session share."""

    warm: Warm
    hub: FakeHub
    home: Path  # of the Hub's client
    data: Path  # a finished data set of 12 groups in 3 shards
    smaller: Path  # some of its groups
    unmarked: Path  # an output of `gft generate` that lacks nothing but the manifest
    verl: Path  # prompts as verl has them
    expected: dict[str, Parts]  # of each command, from a run that nothing disturbed


def progress(what: Command) -> int:
    return len(what.parts()) if what.progress is None else what.progress()


def samples_in(out: Path) -> int:
    """The drawn samples that are safe, in journals and shards; none may have been drawn twice."""
    found = 0
    for shard in range(2):
        if (out / "data" / f"train-{shard:05d}-of-00002.parquet").exists():
            found += 2 * 3
            continue
        folder = out / ".work" / "journal" / f"{shard:05d}"
        lines = [line for path in folder.glob("*") for line in path.read_bytes().split(b"\n")[:-1]]
        keys = [(entry["source"], entry["row"], entry["k"]) for entry in (json.loads(line[9:]) for line in lines)]
        assert len(keys) == len(set(keys)), "drawn twice"
        found += len(keys)
    return found


def steps_of(out: Path) -> int:
    """The step of the newest checkpoint, which is the last one that was due before the step that was at work."""
    found = [int(path.parent.name.removeprefix("step-")) for path in (out / "checkpoints").glob("step-*/state.json")]
    text = (out / "metrics.jsonl").read_text() if (out / "metrics.jsonl").exists() else ""
    done = text.count("\n")
    assert max(found, default=0) >= (done - 1) // 2 * 2, f"{done} steps were done, and {found} are saved"
    return max(found, default=0)


def equal(found: Any, expected: Any) -> bool:
    """Equal; numbers up to the rounding that other batches bring."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(equal(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(equal, found, expected))
    if isinstance(expected, float):
        return isinstance(found, float) and math.isclose(found, expected, rel_tol=1e-5, abs_tol=3e-5)
    return bool(found == expected)


def check(command: Command, expected: Parts) -> None:
    """At whatever moment: no part is wrong, and none is missing where the last one is there."""
    found = command.parts()
    if found == command.before:
        return
    for name, part in found.items():
        possible = [parts[name] for parts in (expected, command.before) if name in parts]
        differing = recipe_differences(possible[0], part) if possible else "it should not be there"
        assert any(equal(part, one) for one in possible), f"{name} is not what it should be: {differing[:500]}"
    if command.last in found:
        assert equal(found[command.last], expected[command.last]), f"{command.last} is that of another state"
        assert found.keys() == expected.keys(), f"finished, and without {expected.keys() - found.keys()}"


def is_done(command: Command) -> bool:
    found = command.parts()
    return command.last in found and found != command.before


def write(path: Path, settings: dict[str, Any]) -> Path:
    path.write_text(json.dumps(settings))
    return path


def generation(out: Path, **changes: Any) -> dict[str, Any]:
    """4 prompts in 2 shards: an expert response, one drawn from a teacher, two of the model's own."""
    teacher = {"name": "again", "model": str(MODEL), "count": 1}
    return {
        "model": str(MODEL),
        "out": str(out),
        "prompts": {
            "path": str(DEMO / "train.jsonl"),
            "columns": {"ground_truth": "answer", "expert": "expert"},
            "limit": 4,
        },
        "reward": {"name": "numeric"},
        "responses": {"max_tokens": 24, "self": {"count": 2}, "teachers": [teacher]},
        "engine": {"device": "cpu"},
        "shards": {"groups_per_shard": 2, "row_group_size": 1},
    } | changes


def training(out: Path, data: Path, **changes: Any) -> dict[str, Any]:
    """6 steps, a checkpoint every 2, an old policy that is refreshed every 3: more to carry than weights."""
    return {
        "model": str(MODEL),
        "data": str(data),
        "out": str(out),
        "objective": {
            "sources": ["expert", "self"],
            "advantage": "one",
            "coefficient": "clipped_ratio",
            "old_policy": "refreshed",
            "refresh_every": 3,
        },
        "optim": {"lr": 1e-3, "schedule": "cosine"},
        "batch": {"groups_per_step": 4, "micro_batch_tokens": 512},
        "checkpoint": {"every_steps": 2, "keep": 2},
        "epochs": 2,
        "device": "cpu",
    } | changes


def evaluation(out: Path) -> dict[str, Any]:
    """Two benchmarks of 3 prompts; the one with a reference is counted last."""
    prompts = {"path": str(DEMO / "eval.jsonl"), "columns": {"ground_truth": "answer"}, "limit": 3}
    return {
        "model": str(MODEL),
        "out": str(out),
        "reward": {"name": "numeric"},
        "max_tokens": 20,
        "num_samples": 2,
        "sampling": {"temperature": 1.0},
        "engine": {"device": "cpu"},
        "benchmarks": [
            {"name": "plain", "prompts": prompts, "greedy": True},
            {"name": "compared", "prompts": prompts, "greedy": False, "reference": str(MODEL)},
        ],
    }


def comparison(out: Path, data: Path) -> dict[str, Any]:
    """One method of 3 steps, and the untrained model."""
    own = ("model", "data", "out", "objective")
    train = {key: value for key, value in training(out, data, epochs=1).items() if key not in own}
    evaluate = {key: value for key, value in evaluation(out).items() if key not in own}
    evaluate["benchmarks"] = evaluate["benchmarks"][:1]
    named = {"model": str(MODEL), "data": str(data), "out": str(out), "methods": ["GFT"]}
    return {**named, "train": train, "eval": evaluate}


def comparison_of(out: Path) -> Parts:
    """Each model's results and the run; the table; of the report, which says when it was made, that it is there."""
    found = {f"base: {name}": part for name, part in results_of(out / "base").items()}
    found |= {f"gft: {name}": part for name, part in (run_of(out / "gft") | results_of(out / "gft")).items()}
    if (out / "comparison.json").exists():
        found["comparison.json"] = json.loads((out / "comparison.json").read_bytes())
    if (out / "report.html").exists():
        found["report.html"] = (out / "report.html").read_text().endswith("</html>\n")
    return found


def results_of(out: Path) -> Parts:
    """The samples of each benchmark and its result."""
    found: Parts = {}
    for name, result in read_results(out).items():
        found[f"{name}: result"] = {**asdict(result), "finished_at": ""}
    for path in (out / "evals").glob("*/samples.parquet"):
        found[f"{path.parent.name}: samples"] = pq.read_table(path).to_pylist()
    return found


def groups_of(out: Path, *, by_content: bool) -> Parts:
    """The shards and the manifest of a data set. By content: what two runs have that draw in other batches."""
    paths = sorted((out / "data").glob("*")) if (out / "data").is_dir() else []
    shards = {path.name: pq.read_table(path).to_pylist() if by_content else path.read_bytes() for path in paths}
    if not (out / "manifest.json").exists():
        return shards
    manifest = json.loads((out / "manifest.json").read_bytes())
    if by_content:
        del manifest["shards"], manifest["checksum"]
    return {**shards, "manifest.json": manifest}


def run_of(out: Path) -> Parts:
    """The trained model and all metrics; before that nothing is promised but a checkpoint to go on from."""
    if not (out / "final").exists():
        return {}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    files = {p.name: p.read_bytes() for p in sorted((out / "final").iterdir())}
    metrics = json.dumps([{key: value for key, value in line.items() if key not in TIMES} for line in lines])
    return {**files, "metrics": metrics, "final": True}  # as text: bit by bit


def files_of(*paths: Path) -> Parts:
    return {path.name: path.read_bytes() for path in paths if path.exists()}


def on_hub(hub: FakeHub) -> Parts:
    return dict(hub.repos[REPO].files) if REPO in hub.repos and hub.repos[REPO].commits else {}


def command(name: str, world: World, case: Path) -> Command:
    """The command of this name, in a new and empty folder."""
    shutil.rmtree(case, ignore_errors=True)
    shutil.rmtree(world.home, ignore_errors=True)
    case.mkdir(parents=True)
    world.hub.repos.clear()
    world.hub.contents.clear()
    out, data = case / "out", world.data
    if name == "generate":
        words = name, write(case / "g.yaml", generation(out))
        return Command(words, lambda: groups_of(out, by_content=True), "manifest.json", lambda: samples_in(out))
    if name == "finalize":
        shutil.copytree(world.unmarked, out)
        return Command((name, out), lambda: groups_of(out, by_content=True), "manifest.json")
    if name in ("train", "train-lora"):
        lora = {"lora": {"rank": 4, "alpha": 8.0}} if name == "train-lora" else {}
        words = "train", write(case / "t.yaml", training(out, data, **lora))
        return Command(words, lambda: run_of(out), "final", lambda: steps_of(out))
    if name == "eval":
        words = "eval", write(case / "e.yaml", evaluation(out))
        return Command(words, lambda: results_of(out), "compared: result")
    if name == "compare":
        words = "compare", write(case / "c.yaml", comparison(out, data))
        return Command(words, lambda: comparison_of(out), "report.html")
    derived: dict[str, tuple[str | Path, ...]] = {
        "rejudge": ("rejudge", data, "--out", out, "--reward", "exact"),
        "rescore": ("rescore", data, "--out", out, "--model", MODEL, "--set", "engine.device=cpu"),
        "merge": ("merge", data, "--out", out, "--groups-per-shard", "5"),
        "filter": ("filter", data, "--out", out, "--max-pass", "0.9"),
    }
    if name in derived:
        return Command(derived[name], lambda: groups_of(out, by_content=False), "manifest.json")
    if name == "split":
        other = case / "other"

        def both() -> Parts:
            first, second = groups_of(out, by_content=False), groups_of(other, by_content=False)
            return first | {f"other/{part}": value for part, value in second.items()}

        return Command(("split", data, "--out-a", out, "--out-b", other, "--share", "0.4"), both, "other/manifest.json")
    if name == "export":
        path = case / "rows.parquet"
        words = ("export", data, "--format", "trl-sft", "--out", path)
        return Command(words, lambda: files_of(path), path.name, refuses="exists already")
    if name == "init":
        names = "generate.yaml", "train.yaml", "eval.yaml", "compare.yaml"
        words = ("init", out, "--model", "m")
        return Command(words, lambda: files_of(*(out / n for n in names)), names[3], refuses="exists already")
    if name == "import":
        paths = out / "prompts.jsonl", out / "generate.yaml"
        words = ("import", "verl", world.verl, "--out", out)
        return Command(words, lambda: files_of(*paths), "generate.yaml", refuses="exists already")
    push = ("push", data, REPO, "--license", "mit")
    if name == "push":
        return Command(push, lambda: on_hub(world.hub), "manifest.json")
    if name == "push-parts":  # over another version, in several commits
        assert world.warm.gft("push", world.smaller, REPO, "--license", "mit").code == 0
        few = (("gftdata.push", "MAX_CHANGES", 2),)
        return Command(push, lambda: on_hub(world.hub), "manifest.json", before=on_hub(world.hub), constants=few)
    assert name == "pull"
    world.hub.repos[REPO] = Repo(private=False)
    names = ["manifest.json", *(f"data/{path.name}" for path in (data / "data").iterdir())]
    world.hub.repos[REPO].commit({name: (data / name).read_bytes() for name in names})
    return Command(("pull", REPO, out), lambda: groups_of(out, by_content=False), "manifest.json")


NAMES = (
    "generate",
    "finalize",
    "train",
    "train-lora",
    "eval",
    "compare",
    "rejudge",
    "rescore",
    "merge",
    "filter",
    "split",
    "export",
    "import",
    "init",
    "push",
    "push-parts",
    "pull",
)


@contextmanager
def open_world(folder: Path) -> Iterator[World]:
    """Inputs and servers of all commands. Raises FileNotFoundError where there is no C compiler."""
    if (library := build(folder)) is None:
        raise FileNotFoundError("cc")
    hub, home, disk = FakeHub(), folder / "disk" / "home", folder / "disk"
    disk.mkdir()
    environment = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_DATASETS_CACHE": str(home / "datasets"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": WRITE,
    }
    warm = Warm(library, folder, disk, **environment)
    try:
        settings = generation(folder / "data")
        settings["prompts"]["limit"] = 12
        settings["responses"] = {"max_tokens": 30, "self": {"count": 3}}
        settings["shards"] = {"groups_per_shard": 4, "row_group_size": 2}
        settings["engine"]["batch_size"] = 1  # so that samples do not depend on what else is drawn
        made = warm.gft("generate", write(folder / "data.yaml", settings))
        assert made.code == 0, made.said
        made = warm.gft("filter", folder / "data", "--out", folder / "smaller", "--max-pass", "0.9")
        assert made.code == 0, made.said
        verl = verl_prompts(folder / "verl.parquet")
        world = World(warm, hub, home, folder / "data", folder / "smaller", folder / "unmarked", verl, {})
        whole = write(folder / "unmarked.yaml", generation(disk / "made"))
        seen = warm.gft("generate", whole, fault=Fault(How.COUNT, 0)).operations
        at = next(n for n, done in enumerate(seen, 1) if done.what == "rename" and done.path.endswith("/manifest.json"))
        shutil.rmtree(disk / "made")
        killed = warm.gft("generate", whole, fault=Fault(How.KILL, at))
        assert killed.code == -9, killed.said
        (disk / "made").rename(world.unmarked)
        yield world
    finally:
        warm.close()
        hub.stop()


def expected(world: World, name: str, case: Path) -> Parts:
    """What is there after a run that nothing disturbed."""
    if name not in world.expected:
        whole = command(name, world, case)
        ended = world.warm.gft(*whole.words, constants=whole.constants)
        assert ended.code == 0, ended.said
        world.expected[name] = whole.parts()
    return world.expected[name]


def verl_prompts(path: Path) -> Path:
    rows = [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": f"{n}+{n}="}],
            "reward_model": {"style": "rule", "ground_truth": str(2 * n)},
            "extra_info": {"index": n, "answer": f"={2 * n}"},
        }
        for n in range(20)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path
