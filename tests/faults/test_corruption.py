"""Files that storage has damaged: each damage is a UserError that names the file, or changes no number at all.

What is read is read as the commands read it: `gft validate` and `gft train` the shards and the manifest, `gft generate`
and `gft finalize` what is in `.work/`, a resumed training its checkpoint and its metrics.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from aid.damage import BINARY, TEXT, Damage

from gftdata import generate as generation
from gftdata.config import GenerateConfig, validate_config
from gftdata.errors import UserError
from gftdata.finalize import finalize
from gftdata.journal import read_journal
from gftdata.locations import checked_shards, verify_data
from gftdata.manifest import Manifest
from gftdata.prepare import read_plan, shard_prompts
from gftdata.store import FolderStore
from gftdata.tokens import load_tokenizer
from gfttrain import checkpoint, metrics
from gfttrain import prepare as preparing
from gfttrain import train as training
from gfttrain.config import TrainConfig
from gfttrain.distributed import alone
from gfttrain.model import load_for_training
from gfttrain.prepare import make_optimizer, make_scheduler, prepare
from gfttrain.stream import ShardReader
from gfttrain.train import train

PROMISE = "damaged {}: detected, with the file named, or harmless"
ALONE = alone(torch.device("cpu"))


def settings(demo: Path, out: Path, seed: int = 0) -> GenerateConfig:
    prompts = {"path": str(demo / "train.jsonl"), "columns": {"ground_truth": "answer", "expert": "expert"}}
    return validate_config(
        GenerateConfig,
        {
            "model": str(demo / "model"),
            "out": str(out),
            "prompts": {**prompts, "limit": 24},
            "reward": {"name": "numeric", "workers": 1},
            "responses": {"self": {"count": 3}, "max_tokens": 48},
            "shards": {"groups_per_shard": 8, "row_group_size": 4},
            "engine": {"device": "cpu"},
            "seed": seed,
        },
        "test",
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, demo: Path) -> Path:
    """One generation at three stages, `drawn` (all samples in journals), `published` and `finished`; and `other`."""
    folder = tmp_path_factory.mktemp("corruption")
    patch = pytest.MonkeyPatch()
    config = settings(demo, folder / "run")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with patch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(generation, "finish_shards", drawing_only(stop))
        generation.generate(config)
    shutil.copytree(folder / "run", folder / "drawn")
    with patch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(generation, "finalize", stop)
        generation.generate(config)
    shutil.copytree(folder / "run", folder / "published")
    generation.generate(config)
    (folder / "run").rename(folder / "finished")
    generation.generate(settings(demo, folder / "other", seed=1))
    return folder


def drawing_only(stop: Callable[..., None]) -> Callable[..., None]:
    """The last phase, ended when all samples are drawn: before a shard is judged."""

    def finish(run: Any, shards: Any, own: Any, tokenizer: Any, journal: Any, on_event: Any) -> None:
        engine = generation.open_engine(run.config.model, run.config.engine, tokenizer)
        for shard in generation.draw(run, shards, own, engine, tokenizer, journal, on_event, begun=True):
            journal.close_shard(shard)
        stop()

    return finish


def digest(*parts: Any) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return found.hexdigest()


def trained_numbers(config: TrainConfig) -> str:
    """All that `gft train` would compute with: of every micro-batch of the run, every tensor, bit by bit."""
    prepared = prepare(config)
    reader = ShardReader(prepared.index, prepared.selection, 8, checked_shards(prepared.shards), 18)
    reader.check(prepared.unscheduled_shards)
    found = [digest(step.num_loss_tokens, step.groups) for step in prepared.steps]
    for work in training._works(config, prepared, ALONE, reader):
        for batch in work.batches:
            tensors = (batch.input_ids_BL, batch.predicts_N, batch.target_ids_N, batch.advantages_N)
            found.append(digest(*(t.numpy() for t in (*tensors, batch.ref_logprobs_N, batch.source_codes_N))))
    return digest(found)


@pytest.fixture
def train_config(demo: Path, tmp_path: Path) -> Callable[[Path], TrainConfig]:
    def of(data: Path) -> TrainConfig:
        values = {"model": str(demo / "model"), "data": str(data), "out": str(tmp_path / "none"), "device": "cpu"}
        return validate_config(TrainConfig, {**values, "batch": {"groups_per_step": 5}}, "test")

    return of


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, demo: Path) -> None:
    """What is of the model is the same in each case, and read once."""
    tokenizer, outlined = load_tokenizer(str(demo / "model")), preparing.outline(str(demo / "model"))
    monkeypatch.setattr(preparing, "load_tokenizer", lambda model: tokenizer)
    monkeypatch.setattr(preparing, "outline", lambda model: outlined)


def attempt(read: Callable[[], object], named: Sequence[str], what: str) -> object:
    """What `read` gives; None where it is a UserError of one line that names one of the damaged files."""
    try:
        return read()
    except UserError as error:
        said = str(error)
        assert any(name in said for name in named), f"{what}: names no damaged file: {said}"
        assert len(said.splitlines()) == 1, f"{what}: {said}"
        return None
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


def damaged(
    whole: Path, copy: Path, rng: Random, cases: int, kinds: Sequence[Damage], pattern: str, elsewhere: Sequence[Path]
) -> Iterator[tuple[str, list[str]]]:
    """Damage one file of a copy of `whole` that matches `pattern`, again and again: what was done, names of files."""
    shutil.copytree(whole, copy)
    number = 0
    while number < cases:
        files = sorted(path for path in copy.glob(pattern) if path.stat().st_size)  # a lock is empty
        path, kind = rng.choice(files), rng.choice(kinds)
        # of two data sets, mostly the files of one name are taken for each other
        others = [p for p in elsewhere if p.name == path.name] if rng.random() < 0.5 else []
        others = [shutil.copy(p, copy.parent / p.name) for p in others] or [p for p in files if p != path]
        before = path.read_bytes()
        done = kind(rng, path, others) if others or kind.__name__ != "swap" else kinds[0](rng, path, others)
        if not path.is_file() or path.read_bytes() != before:
            number += 1
            yield f"case {number}: {path.relative_to(copy)}: {done}", [path.name, *(p.name for p in others)]
        shutil.rmtree(copy)
        shutil.copytree(whole, copy)


def test_shards(
    made: Path,
    tmp_path: Path,
    rng: Random,
    num_cases: Any,
    tried: Any,
    train_config: Callable[[Path], TrainConfig],
    quick: None,
) -> None:
    cases = num_cases(70, 800)
    tried(PROMISE.format("shards"), cases)
    expected = trained_numbers(train_config(made / "finished"))
    elsewhere = sorted((made / "other/data").glob("*"))
    detected = 0
    for what, names in damaged(made / "finished", tmp_path / "set", rng, cases, BINARY, "data/*.parquet", elsewhere):
        found = attempt(lambda: trained_numbers(train_config(tmp_path / "set")), names, what)
        assert found in (None, expected), f"{what}: other numbers were trained on"
        problems = attempt(lambda: verify_data(str(tmp_path / "set")), names, what)
        assert problems is None or any(name in line for name in names for line in problems), f"{what}: not validated"
        detected += found is None
    assert detected > cases * 0.9


def test_manifest(
    made: Path,
    tmp_path: Path,
    rng: Random,
    num_cases: Any,
    tried: Any,
    train_config: Callable[[Path], TrainConfig],
    quick: None,
) -> None:
    cases = num_cases(70, 500)
    tried(PROMISE.format("manifests"), cases)
    expected = trained_numbers(train_config(made / "finished"))
    for what, names in damaged(
        made / "finished", tmp_path / "set", rng, cases, TEXT, "manifest.json", [made / "other/manifest.json"]
    ):
        # another data set's manifest is whole: the shards are not those that it speaks of
        names += [".parquet"] if "swapped" in what else ["no manifest.json", "unfinished"] if "gone" in what else []
        found = attempt(lambda: trained_numbers(train_config(tmp_path / "set")), names, what)
        assert found in (None, expected), f"{what}: other numbers were trained on"
        attempt(lambda: verify_data(str(tmp_path / "set")), names, what)


@pytest.mark.parametrize("pattern", [".work/records/*", ".work/plan.json", ".work/prompts/*/*", "data/*"])
def test_what_a_generation_ends_with(
    made: Path, tmp_path: Path, rng: Random, num_cases: Any, tried: Any, pattern: str
) -> None:
    """Commit records, plan, prompts and shards, before the manifest is made of them."""
    cases = num_cases(25, 150)
    tried(PROMISE.format("commit records, plans and prompts"), cases)
    expected = finalize(FolderStore(copied(made / "published", tmp_path / "whole")))
    elsewhere = sorted((made / "other").glob(pattern))
    kinds = BINARY if pattern == "data/*" else TEXT
    for what, names in damaged(made / "published", tmp_path / "set", rng, cases, kinds, pattern, elsewhere):
        names += ["not an output of gft generate", "its manifest.json is gone"] if "gone" in what else []
        found = attempt(lambda: finalize(FolderStore(tmp_path / "set")), names, what)
        assert found is None or same_data(found, expected), f"{what}: another data set"


def same_data(found: object, expected: Manifest) -> bool:
    assert isinstance(found, Manifest)
    return found.model_dump() == expected.model_dump()


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def test_journals(made: Path, tmp_path: Path, rng: Random, num_cases: Any, tried: Any, demo: Path) -> None:
    """Whatever is read of a sample is what was drawn; what cannot be read is drawn again."""
    cases = num_cases(60, 300)
    tried(PROMISE.format("journals"), cases)

    def samples(folder: Path) -> dict[Any, str]:
        store = FolderStore(folder)
        plan = read_plan(store)
        assert plan is not None
        found = {}
        for shard in range(plan.num_shards):
            ids = [item.prompt.prompt_id for item in shard_prompts(store, plan, shard)]
            for (source, row, k), entry in read_journal(store, shard).items():
                parts = (entry.text, entry.response_ids, entry.behavior_logprobs, entry.seed, entry.model)
                found[ids[row], source, k] = digest(*parts, entry.finish_reason)
        return found

    whole = samples(made / "drawn")
    assert len(whole) == 72
    for what, names in damaged(made / "drawn", tmp_path / "set", rng, cases, TEXT, ".work/journal/*/*", []):
        found = attempt(lambda: samples(tmp_path / "set"), names, what)
        if found is not None:
            assert isinstance(found, dict) and found.items() <= whole.items(), f"{what}: another sample"


def test_a_generation_that_goes_on_from_damaged_journals_ends_as_if_nothing_had_been(
    made: Path, tmp_path: Path, rng: Random, num_cases: Any, tried: Any, demo: Path
) -> None:
    cases = num_cases(1, 6)
    tried(PROMISE.format("journals"), cases)
    expected = texts(made / "finished")
    for _ in range(cases):
        folder = made / "run"  # its name is in the recipe
        shutil.copytree(made / "drawn", folder)
        try:
            for path in folder.glob(".work/journal/*/*"):
                content = path.read_bytes()
                path.write_bytes(content[: rng.randrange(len(content))])
            generation.generate(settings(demo, folder))
            assert texts(folder) == expected and not verify_data(str(folder))
        finally:
            shutil.rmtree(folder)


def texts(folder: Path) -> list[Any]:
    """What the samples are; in another batch their log-probs are rounded otherwise."""
    columns = ["prompt_id", "response_ids", "responses", "rewards", "seeds", "finish_reasons"]
    return [pq.read_table(path, columns=columns).to_pylist() for path in sorted((folder / "data").glob("*"))]


@pytest.fixture(scope="module")
def run(made: Path, demo: Path) -> tuple[Path, TrainConfig]:
    """A training of 5 steps, with the checkpoints of steps 4 and 5."""
    values = {
        "model": str(demo / "model"),
        "data": str(made / "finished"),
        "out": str(made / "trained"),
        "device": "cpu",
        "batch": {"groups_per_step": 5},
        "checkpoint": {"every_steps": 2, "keep": 2},
    }
    config = validate_config(TrainConfig, values, "test")
    train(config)
    shutil.rmtree(made / "trained/final")
    return made / "trained", config


def test_checkpoints(run: tuple[Path, TrainConfig], tmp_path: Path, rng: Random, num_cases: Any, tried: Any) -> None:
    out, config = run
    cases = num_cases(60, 500)
    tried(PROMISE.format("checkpoints"), cases)
    policy = load_for_training(config, ALONE)
    parameters = list(policy.parameters())
    optimizer = make_optimizer(config, parameters)
    scheduler = make_scheduler(config, optimizer, 5)

    def resumed(folder: Path) -> str:
        for parameter in parameters:
            parameter.data.fill_(7.0)
        newest = checkpoint.latest(folder)
        assert newest is not None
        position = checkpoint.read_position(newest)
        checkpoint.restore(newest, ALONE, policy, optimizer, scheduler)
        state = [tensor.numpy() for p in parameters for tensor in optimizer.state[p].values()]
        weights = [p.detach().numpy() for p in parameters]
        return digest(*weights, *state, position, scheduler.state_dict(), torch.get_rng_state().numpy())

    whole = resumed(out)
    earlier = tmp_path / "earlier"
    shutil.copytree(out, earlier)
    shutil.rmtree(earlier / "checkpoints/step-00000005")
    before, newest = resumed(earlier), sorted((out / "checkpoints/step-00000004").rglob("*"))
    elsewhere = [path for path in newest if path.is_file()]
    for what, names in damaged(
        out, tmp_path / "run", rng, cases, BINARY, "checkpoints/step-00000005/**/*.*", elsewhere
    ):
        # without its state.json a checkpoint is not there, and the one before is taken: the run ends with the same bits
        allowed = (None, whole, before) if what.endswith("state.json: gone") else (None, whole)
        assert attempt(lambda: resumed(tmp_path / "run"), names, what) in allowed, f"{what}: other weights"


def test_run_files(run: tuple[Path, TrainConfig], tmp_path: Path, rng: Random, num_cases: Any, tried: Any) -> None:
    """run.json and metrics.jsonl, as a resumed run finds them."""
    out, config = run
    cases = num_cases(40, 200)
    tried(PROMISE.format("run.json and metrics.jsonl"), cases)
    elsewhere = config.model_copy(update={"out": str(tmp_path / "run")})
    whole = (out / "metrics.jsonl").read_bytes()

    def resumed() -> tuple[int, bytes]:
        prepared = prepare(elsewhere)
        metrics.cut_back(tmp_path / "run/metrics.jsonl", prepared.first_step)
        path = tmp_path / "run/metrics.jsonl"
        return prepared.first_step, path.read_bytes() if path.is_file() else b""

    for what, names in damaged(out, tmp_path / "run", rng, cases, TEXT, "*.json*", []):
        found = attempt(resumed, [*names, str(tmp_path / "run")], what)
        if found is not None and "metrics.jsonl" not in what:
            assert found == (5, whole), what
