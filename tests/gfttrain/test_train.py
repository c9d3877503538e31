"""A run from shards to weights: what it writes, what it reports, what it refuses."""

import fcntl
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from training_helpers import DEMO, MODEL, tiny_policy, train_settings
from transformers import AutoModelForCausalLM, AutoTokenizer

from gftdata.errors import UserError
from gftdata.index import read_index
from gftdata.manifest import read_manifest
from gftdata.shards import shard_paths
from gfttrain import train as training
from gfttrain.config import BatchConfig, ObjectiveConfig
from gfttrain.plan import make_schedule, select
from gfttrain.prepare import prepare
from gfttrain.presets import METHODS, folder_name
from gfttrain.runs import LOCK, finished_model
from gfttrain.train import Event, train

SOURCES = ("expert", "teacher:hint", "self")


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event]]:
    """Two epochs of GFT: 12 steps of 8 groups."""
    out = tmp_path_factory.mktemp("run") / "run"
    events: list[Event] = []
    config = train_settings(data, out, epochs=2, checkpoint={"every_steps": 3, "keep": 2})
    assert train(config, events.append) == out / "final"
    return out, events


def test_the_final_folder_is_a_transformers_model(run: tuple[Path, list[Event]]) -> None:
    final = run[0] / "final"
    model = AutoModelForCausalLM.from_pretrained(final)
    tokenizer = AutoTokenizer.from_pretrained(final)
    base = AutoModelForCausalLM.from_pretrained(MODEL)
    assert {p.name for p in MODEL.iterdir()} <= {p.name for p in final.iterdir()}
    assert model.dtype == base.dtype == torch.float32
    assert model.generation_config.eos_token_id == base.generation_config.eos_token_id == 1
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(MODEL).get_vocab()
    moved = {name: (p - dict(base.named_parameters())[name]).abs().max() for name, p in model.named_parameters()}
    assert all(0 < distance < 0.1 for distance in moved.values()), moved
    assert model.lm_head.weight is model.model.embed_tokens.weight  # tied as before
    assert "lm_head.weight" not in weights(final)
    ids = tokenizer("34+21+18=", return_tensors="pt")["input_ids"]
    text = tokenizer.decode(model.generate(ids, max_new_tokens=48, do_sample=False)[0], skip_special_tokens=True)
    assert text.startswith("34+21+18=") and any(c.isdigit() for c in text[9:])


def test_one_line_of_metrics_a_step(run: tuple[Path, list[Event]], data: Path) -> None:
    out, events = run
    found = lines(out)
    assert [line["step"] for line in found] == list(range(1, 13))
    assert [line["epoch"] for line in found] == [0] * 6 + [1] * 6
    always = {"loss", "grad_norm", "lr", "entropy", "rectified_fraction", "tokens_per_second", "seconds"}
    always |= {"computed_tokens", "data/groups", "data/loss_tokens", "data/groups_with_signal"}
    always |= {"data/responses_unjudged", *(f"data/{kind}/{s}" for kind in ("reward", "pass_rate") for s in SOURCES)}
    for line in found:
        assert always | {f"log_ratio/{s}" for s in SOURCES} <= set(line)
        assert all(math.isfinite(line[name]) for name in always)
        assert line["data/groups"] == 8 and line["data/responses_unjudged"] == 0
        assert line["data/reward/expert"] == 1.0 and 0 < line["data/pass_rate/self"] < 1
        assert 0 < line["rectified_fraction"] < 1 and 0 < line["entropy"] < math.log(18)
        assert line["computed_tokens"] <= line["data/loss_tokens"]
        assert line["lr"] == 1e-3
    assert sum(line["data/loss_tokens"] for line in found) == 2 * read_manifest(data).summary.response_tokens
    assert [e.metrics for e in events if e.kind == "step"] == found
    assert [(e.kind, e.step) for e in events if e.kind != "step"] == [
        ("start", 0),
        *(("checkpoint", step) for step in (3, 6, 9, 12)),
    ]
    assert {e.num_steps for e in events} == {12}


def test_the_first_steps_metrics_by_hand(run: tuple[Path, list[Event]], data: Path) -> None:
    # the model is the reference still: every number follows from the stored columns and METHOD.md
    index = read_index(shard_paths(data, read_manifest(data)))
    selection = select(index, ObjectiveConfig())
    batch = BatchConfig(groups_per_step=8)
    step = make_schedule(index, selection, batch, seed=0, epochs=1, max_steps=1, skip_unjudged=False)[0]
    table = [row for path in index.paths for row in pq.read_table(path).to_pylist()]
    loss, num_tokens, rectified, computed = 0.0, 0, 0, 0
    for group in step.groups:
        row = table[group]
        rewards = np.array(row["rewards"])
        advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
        for advantage, ref in zip(advantages, row["ref_logprobs"], strict=True):
            logprobs = np.array(ref)
            num_tokens += len(logprobs)
            if rewards.min() < rewards.max():
                probs = np.exp(logprobs)
                loss -= (advantage * np.where(probs < 0.7, probs, 1.0) * logprobs).sum()
                rectified += int((probs < 0.7).sum())
                computed += len(logprobs)
    first = lines(run[0])[0]
    assert first["data/loss_tokens"] == num_tokens
    assert first["computed_tokens"] == computed
    assert first["loss"] == pytest.approx(loss / num_tokens, rel=1e-4)
    assert first["rectified_fraction"] == pytest.approx(rectified / computed, abs=1.5 / computed)
    for source in SOURCES:
        assert abs(first[f"log_ratio/{source}"]) < 1e-5
    assert abs(lines(run[0])[-1]["log_ratio/self"]) > 1e-3  # and it moves away


def test_keeps_the_newest_checkpoints(run: tuple[Path, list[Event]]) -> None:
    assert sorted(p.name for p in (run[0] / "checkpoints").iterdir()) == ["step-00000009", "step-00000012"]


def test_a_finished_run_is_left_as_it_is(run: tuple[Path, list[Event]], data: Path) -> None:
    out, _ = run
    before = files(out)
    config = train_settings(data, out, epochs=2, checkpoint={"every_steps": 3, "keep": 2})
    events: list[Event] = []
    assert train(config, events.append) == out / "final"
    assert files(out) == before and not any(event.kind == "step" for event in events)


def test_the_cut_and_the_layout_do_not_change_the_run(
    run: tuple[Path, list[Event]], data: Path, tmp_path: Path
) -> None:
    reference = weights(run[0] / "final")
    others = [{"micro_batch_tokens": 150}, {"layout": "packed", "micro_batch_tokens": 500}, {"layout": "padded"}]
    for number, batch in enumerate(others):
        out = tmp_path / str(number)
        train(train_settings(data, out, max_steps=3, batch=batch))
        for found, expected in zip(lines(out), lines(run[0]), strict=False):
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3, abs=1e-5)
            assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
        assert weights(out / "final").keys() == reference.keys()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method: str, data: Path, tmp_path: Path) -> None:
    out = tmp_path / folder_name(method)
    train(train_settings(data, out, objective=METHODS[method].model_dump(), max_steps=3))
    found = lines(out)
    assert len(found) == 3
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in found)
    assert not same(weights(out / "final"), weights(MODEL))
    rectified = METHODS[method].coefficient == "rectified"
    assert all(("rectified_fraction" in line) == rectified for line in found)
    if METHODS[method].tau == 0 and rectified:
        assert all(line["rectified_fraction"] == 0 for line in found)
    if METHODS[method].tau > 1:
        assert all(line["rectified_fraction"] == 1 for line in found)
    if METHODS[method].kl_coef > 0:  # the penalty computes groups without signal too
        assert all(line["computed_tokens"] == line["data/loss_tokens"] for line in found)


def test_clipped_ratio_starts_at_one(data: Path, tmp_path: Path) -> None:
    # with the current model as old policy the first loss of a window is minus the token mean of the advantages
    objective = {**METHODS["PSFT"].model_dump(), "refresh_every": 2}
    out = tmp_path / "run"
    train(train_settings(data, out, objective=objective, max_steps=4))
    losses = [line["loss"] for line in lines(out)]
    assert losses[0] == pytest.approx(-1, abs=1e-5) and losses[2] == pytest.approx(-1, abs=1e-5)
    assert abs(losses[1] + 1) > 1e-4 and abs(losses[3] + 1) > 1e-4


def test_sft_learns_the_expert(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(train_settings(data, out, objective=METHODS["SFT"].model_dump(), epochs=2))
    losses = [line["loss"] for line in lines(out)]
    assert np.mean(losses[6:]) < 0.8 * np.mean(losses[:6])


def steps_without_signal(data: Path, seed: int) -> list[int]:
    """The steps of one group of expert and self responses that have no signal."""
    index = read_index(shard_paths(data, read_manifest(data)))
    selection = select(index, ObjectiveConfig(sources=("expert", "self")))
    batch = BatchConfig(groups_per_step=1)
    steps = make_schedule(index, selection, batch, seed=seed, epochs=1, max_steps=None, skip_unjudged=False)
    responses = [np.concatenate([np.arange(*index.offsets[g : g + 2]) for g in step.groups]) for step in steps]
    return [n for n, chosen in enumerate(responses) if not selection.trained_R[chosen].any()]


def test_a_step_without_signal_still_calls_the_optimizer(data: Path, tmp_path: Path) -> None:
    number = next(n for n in steps_without_signal(data, 0) if n > 0)
    after: list[dict[str, torch.Tensor]] = []
    for steps in (number, number + 1):
        out = tmp_path / str(steps)
        settings = {"objective": {"sources": ["expert", "self"]}, "batch": {"groups_per_step": 1}}
        train(train_settings(data, out, max_steps=steps, **settings))
        after.append(weights(out / "final"))
    line = lines(tmp_path / str(number + 1))[-1]
    assert line["loss"] == 0 and line["grad_norm"] == 0 and line["computed_tokens"] == 0
    assert line["entropy"] is None and line["data/loss_tokens"] > 0 and line["data/groups_with_signal"] == 0
    assert not same(*after)  # momentum and weight decay act


def test_a_step_without_signal_before_any_momentum_only_decays(data: Path, tmp_path: Path) -> None:
    seed = next(seed for seed in range(99) if 0 in steps_without_signal(data, seed))
    settings = {"objective": {"sources": ["expert", "self"]}, "batch": {"groups_per_step": 1}, "seed": seed}
    train(train_settings(data, tmp_path / "run", max_steps=1, optim={"weight_decay": 0.1}, **settings))
    base, found = weights(MODEL), weights(tmp_path / "run" / "final")
    for name, tensor in base.items():
        torch.testing.assert_close(found[name], tensor * (1 - 1e-3 * 0.1), rtol=1e-6, atol=0)


def test_learning_rate_follows_the_schedule(data: Path, tmp_path: Path) -> None:
    optim = {"lr": 1e-3, "schedule": "linear", "warmup_ratio": 0.25}
    train(train_settings(data, tmp_path / "run", batch={"groups_per_step": 2}, max_steps=6, optim=optim))
    # 6 steps, ceil(1.5) = 2 of them warm-up
    expected = [0.0, 0.5e-3, *(1e-3 * (6 - step) / 4 for step in (2, 3, 4, 5))]
    assert [line["lr"] for line in lines(tmp_path / "run")] == pytest.approx(expected)


def test_gradients_are_clipped_to_the_norm(data: Path, tmp_path: Path) -> None:
    # the first update of SGD-like AdamW is independent of scale, so look at the second moment of the optimizer
    norms = []
    for limit in (1e-3, 1e3):
        out = tmp_path / str(limit)
        train(train_settings(data, out, max_steps=2, optim={"max_grad_norm": limit}, checkpoint={"every_steps": 1}))
        (shard,) = (out / "checkpoints" / "step-00000001" / "shards").glob("*.safetensors")
        state = load_file(shard)
        first_moments = [tensor for name, tensor in state.items() if name.endswith("exp_avg")]
        norms.append(10 * math.sqrt(sum(float((t.double() ** 2).sum()) for t in first_moments)))  # (1 - beta1) grad
    reported = lines(tmp_path / "1000.0")[0]["grad_norm"]
    assert norms == [pytest.approx(1e-3, rel=1e-3), pytest.approx(reported, rel=1e-3)]
    assert lines(tmp_path / "0.001")[0]["grad_norm"] == reported  # reported before clipping


def test_a_bfloat16_base_is_exported_as_it_was(data: Path, tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "half")
    AutoModelForCausalLM.from_pretrained(MODEL).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    config = train_settings(data, tmp_path / "run", model=str(tmp_path / "half"), max_steps=1)
    events: list[Event] = []
    train(config, events.append)
    assert {t.dtype for t in weights(tmp_path / "run" / "final").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final").dtype == torch.bfloat16
    weights_differ, noise_floor = events[0].notices
    assert "has other weights" in weights_differ  # than those that generated the data
    assert "stored and recomputed log-probs differ by" in noise_floor


def test_two_data_sets_are_trained_together(data: Path, unjudged_data: Path, tmp_path: Path) -> None:
    config = train_settings(data, tmp_path / "run", data=[str(data), str(unjudged_data)], unjudged_groups="skip")
    train(config)
    found = lines(tmp_path / "run")
    assert sum(line["data/groups"] for line in found) == 48 + 10
    assert sum(line["data/groups"] for line in found) == sum(len(step.groups) for step in prepare(config).steps)


def test_unjudged_groups_are_refused_or_skipped(unjudged_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(UserError, match=r"2 of 12 groups have no judged response.*unjudged_groups=skip"):
        train(train_settings(unjudged_data, out))
    assert not out.exists()
    train(train_settings(unjudged_data, out, unjudged_groups="skip"))
    assert sum(line["data/groups"] for line in lines(out)) == 10


def test_weights_that_are_not_numbers_stop_the_run_before_it_begins(data: Path, tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "broken")
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    model.save_pretrained(tmp_path / "broken")
    out = tmp_path / "run"
    with pytest.raises(UserError, match="the starting model gives log-probs that are not finite"):
        train(train_settings(data, out, model=str(tmp_path / "broken")))
    assert not (out / "metrics.jsonl").exists() and not (out / "final").exists()


def test_a_diverging_run_says_which_step(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(UserError, match=r"step [2-6]: loss .*Lower optim.lr"):
        train(train_settings(data, out, optim={"lr": 1e30, "weight_decay": 0.0}))
    assert not (out / "final").exists()


def test_losses_that_are_not_numbers_save_the_state_before_and_name_the_groups(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    poisoned = prepare(train_settings(data, out)).steps[2].groups[3]
    index = prepare(train_settings(data, out)).index
    victim = int(index.offsets[poisoned])
    whole = training.token_losses

    def losses(objective: Any, logprobs: torch.Tensor, advantages: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        found = whole(objective, logprobs, advantages, *rest)
        return torch.where(advantages == 99.0, torch.nan, found)

    selected = select

    def select_and_mark(*arguments: Any) -> Any:
        selection = selected(*arguments)
        selection.advantages_R[victim], selection.trained_R[victim], selection.used_R[victim] = 99.0, True, True
        return selection

    monkeypatch.setattr(training, "token_losses", losses)
    monkeypatch.setattr("gfttrain.prepare.select", select_and_mark)
    with pytest.raises(UserError, match=r"step 3: loss nan.*the state before this step is saved") as caught:
        train(train_settings(data, out, checkpoint={"every_steps": 99}))
    assert "Not finite in 1 groups" in str(caught.value) and index.place_of(int(poisoned)) in str(caught.value)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.parametrize("device", ["cuda", "cpu", "numpy"])
def test_out_of_memory_says_what_to_lower(
    device: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        if device == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
        return torch.empty(2**55) if device == "cpu" else np.empty(2**55)

    monkeypatch.setattr(training, "token_losses", full)
    told = {
        "cuda": "CUDA out of memory",
        "cpu": "tried to allocate 144115188075855872 bytes",
        "numpy": "256. PiB",
    }
    expected = rf"micro-batches of 1024 tokens: .*({told[device]}).*batch.micro_batch_tokens=512.*checkpointing"
    with pytest.raises(UserError, match=expected):
        train(train_settings(data, tmp_path / "run"))


def test_a_model_far_from_the_stored_log_probs_does_not_start(data: Path, tmp_path: Path) -> None:
    model = tmp_path / "moved"
    shutil.copytree(MODEL, model)
    moved = AutoModelForCausalLM.from_pretrained(MODEL)
    with torch.no_grad():
        moved.model.norm.weight *= 3.0
    moved.save_pretrained(model)
    config = train_settings(data, tmp_path / "run", model=str(model), max_steps=1)
    with pytest.raises(UserError, match=r"stored reference log-probs are not those of .*max_reference_gap=0.15"):
        train(config)
    assert not (tmp_path / "run").exists()
    train(config.model_copy(update={"max_reference_gap": 99.0}))


def test_a_weak_model_is_warned_about(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not [n for n in prepare(train_settings(data, tmp_path / "run")).notices if "can diverge" in n]
    monkeypatch.setattr("gftdata.summary.WEAK_PASS_RATE", 0.999)
    (notice,) = [n for n in prepare(train_settings(data, tmp_path / "run")).notices if "can diverge" in n]
    assert "pass at a rate of 0." in notice


def test_the_kl_estimate_is_reported_where_self_samples_follow_the_reference(run: tuple[Path, list[Event]]) -> None:
    for line in lines(run[0]):
        assert line["kl_ref_to_model"] == -line["log_ratio/self"]
        assert 0 <= line["stale_fraction"] <= 1 and 0 <= line["data_wait_fraction"] <= 1
        assert sum(line["weights_before"]) == sum(line["weights_after"]) == line["computed_tokens"]
        assert line["weights_after"][1:] == [0] * 15  # C / pi is at most 1 / tau = 1.43: all in [1, 2)
        assert sum(line["weights_before"][1:]) > 0
        assert all(f"rectified_fraction/{source}" in line for source in SOURCES)


def test_a_run_folder_is_its_trained_model_once_it_is_finished(run: tuple[Path, list[Event]], tmp_path: Path) -> None:
    assert finished_model(str(run[0])) == str(run[0] / "final")
    assert finished_model(str(MODEL)) == str(MODEL)
    shutil.copytree(run[0], tmp_path / "run", ignore=shutil.ignore_patterns("final"))
    with pytest.raises(UserError, match="this run of gft train is not finished"):
        finished_model(str(tmp_path / "run"))


def test_lora_exports_the_merged_model_and_the_adapter(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(train_settings(data, out, lora={"rank": 4}, max_steps=3))
    merged, base = weights(out / "final"), weights(MODEL)
    assert merged.keys() == base.keys()
    changed = {name for name in base if not torch.equal(merged[name], base[name])}
    assert changed and all("proj" in name for name in changed)
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    assert AutoModelForCausalLM.from_pretrained(out / "final").dtype == torch.float32


def test_a_model_that_cannot_be_written_is_one_line_and_the_run_goes_on_from_its_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    config = train_settings(data, tmp_path / "run", max_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedModel.save_pretrained", full)
        with pytest.raises(UserError, match=r"final: cannot be written, and the last checkpoint is whole: .*No space"):
            train(config)
    assert not (tmp_path / "run" / "final").exists()
    events: list[Event] = []
    train(config, events.append)
    assert [event.kind for event in events] == ["start"] and (tmp_path / "run" / "final").is_dir()


def test_a_run_that_was_killed_while_it_marked_its_folder_begins_again(data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.json.0a1b").write_text('{"rec')
    assert prepare(train_settings(data, tmp_path / "run")).first_step == 0
    (tmp_path / "run" / "other").touch()
    with pytest.raises(UserError, match="not empty and not a run of gft train"):
        prepare(train_settings(data, tmp_path / "run"))


def test_two_processes_do_not_train_in_one_folder(data: Path, tmp_path: Path) -> None:
    config = train_settings(data, tmp_path / "run", max_steps=2)
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another gft train is writing there"):
            train(config)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
    train(config)


def test_what_another_process_did_since_the_look_is_not_undone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = train_settings(data, tmp_path / "run", max_steps=2)
    before = prepare(config)
    train(config)
    shutil.rmtree(tmp_path / "run" / "final")
    written = files(tmp_path / "run")
    monkeypatch.setattr(training, "prepare", lambda config: before)
    with pytest.raises(UserError, match="another gft train has gone on there meanwhile"):
        train(config)
    assert files(tmp_path / "run").keys() == written.keys()
    assert lines(tmp_path / "run") == [json.loads(line) for line in written["metrics.jsonl"][1].splitlines()]


@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
@pytest.mark.parametrize("checkpointing", [False, "selective"])
def test_compiled_layers_take_the_same_steps(
    checkpointing: Any, run: tuple[Path, list[Event]], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # captured and differentiated as for inductor, whose own compilation takes minutes here
    whole, compiled = torch.nn.Module.compile, []

    def compile_(module: torch.nn.Module, **settings: Any) -> None:
        compiled.append(module)
        whole(module, backend="aot_eager", **settings)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    settings = {"compile": True, "gradient_checkpointing": checkpointing}
    train(train_settings(data, tmp_path / "run", max_steps=2, **settings))
    assert len(compiled) == 2
    for found, expected in zip(lines(tmp_path / "run"), lines(run[0]), strict=False):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4, abs=1e-6)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("no data", {"data": "nowhere"}, r"nowhere: no such data set folder"),
    ("not a data set", {"data": str(DEMO)}, r"demo: no manifest.json"),
    ("no model", {"model": "./nowhere"}, r"nowhere: no such model folder"),
    ("no used source", {"objective": {"sources": ["teacher:other"]}}, r"teacher:other, which the data does not have"),
    (
        "unused source",
        {"objective": {"advantage": "one", "sources": ["expert"], "min_reward": 9.0}},
        r"no response is left",
    ),
    ("no signal", {"objective": {"sources": ["expert"]}}, r"no group has a training signal"),
    ("unknown schedule", {"optim": {"schedule": "cosin"}}, r"optim.schedule cosin cannot be used"),
    ("plateau", {"optim": {"schedule": "reduce_lr_on_plateau"}}, r"optim.schedule reduce_lr_on_plateau follows"),
    ("greedy", {"optim": {"schedule": "greedy"}}, r"optim.schedule greedy follows a metric"),
    ("wsd", {"optim": {"schedule": "warmup_stable_decay"}}, r"optim.schedule warmup_stable_decay cannot be used"),
    ("no device", {"device": "cuda:99"}, r"device `cuda:99` cannot be used"),
    ("nonsense device", {"device": "toaster"}, r"device `toaster` cannot be used"),
]


@pytest.mark.parametrize(("name", "settings", "message"), REFUSED, ids=[name for name, *_ in REFUSED])
def test_refused_before_anything_is_written(
    name: str, settings: dict[str, Any], message: str, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(UserError, match=message) as caught:
        train(train_settings(data, out, **settings))
    assert "\n" not in str(caught.value)
    assert not out.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": {"lrr": 1}}, r"unknown key `optim.lrr`; did you mean `lr`\?"),
        ({"optim": {"betas": [0.9, 1.0]}}, r"`optim.betas.1`"),
        ({"optim": {"lr": 0}}, r"`optim.lr`"),
        ({"objective": {"sources": ["experts"]}}, r"expected some of expert, teacher, self"),
        ({"objective": {"sources": []}}, r"sources"),
        ({"objective": {"min_reward": 1.0}}, r"set advantage to one"),
        ({"data": []}, r"`data`"),
        ({"batch": {"layout": "flat"}}, r"`batch.layout`"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        train_settings(data, tmp_path / "run", **settings)


def test_packing_is_refused_where_responses_would_mix(data: Path, tmp_path: Path) -> None:
    tiny_policy("bloom", torch.float32, "padded").model.save_pretrained(tmp_path / "bloom")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, tmp_path / "bloom")
    settings = {"model": str(tmp_path / "bloom"), "max_steps": 1, "max_reference_gap": 99.0}
    with pytest.raises(UserError, match=r"BloomForCausalLM does not take its attention.*set batch\.layout=padded"):
        train(train_settings(data, tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()
    train(train_settings(data, tmp_path / "run", batch={"layout": "padded"}, **settings))  # which trains it
    assert len(lines(tmp_path / "run")) == 1


def copy_of(data: Path, tmp_path: Path) -> Path:
    shutil.copytree(data, tmp_path / "copy")
    return tmp_path / "copy"


def test_an_unfinished_data_set_is_refused(data: Path, tmp_path: Path) -> None:
    copy = copy_of(data, tmp_path)
    (copy / "manifest.json").unlink()
    with pytest.raises(UserError, match="unfinished data set"):
        train(train_settings(copy, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_missing_shard_is_named(data: Path, tmp_path: Path) -> None:
    copy = copy_of(data, tmp_path)
    (copy / "data" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(UserError, match=r"train-00001-of-00003.parquet: this shard is missing"):
        train(train_settings(copy, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_another_models_tokenizer_is_refused(data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(MODEL, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["3"], vocab["4"] = vocab["4"], vocab["3"]  # the same size and characters, other ids
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=r"token ids come from the tokenizer of .*model, and .*other has another"):
        train(train_settings(data, tmp_path / "run", model=str(other)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["notes.txt", "run.json", "metrics.jsonl"])
def test_a_folder_that_belongs_to_something_else_is_left_alone(content: str, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "precious"
    out.mkdir()
    (out / content).write_text('{"mine": 1}\n')
    before = files(out)
    with pytest.raises(UserError, match="not empty and not a run of gft train"):
        train(train_settings(data, out))
    assert files(out) == before


def test_an_output_that_is_a_file_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    for out in (tmp_path / "run", tmp_path / "run" / "below"):
        with pytest.raises(UserError, match="cannot be a folder"):
            train(train_settings(data, out))
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"optim": {"lr": 2e-3}}, "optim.lr"),
        ({"objective": {"tau": 0.1}}, "objective.tau"),
        ({"epochs": 3}, "epochs"),
        ({"seed": 1}, "seed"),
        ({"batch": {"groups_per_step": 4}}, "batch.groups_per_step"),
        ({"dtype": "bfloat16"}, "dtype"),
    ],
)
def test_another_config_is_refused_by_its_key(
    settings: dict[str, Any], key: str, run: tuple[Path, list[Event]], data: Path
) -> None:
    out = run[0]
    before = files(out)
    with pytest.raises(UserError, match=rf"was begun with another config: `{re.escape(key)}` was"):
        train(train_settings(data, out, **{"epochs": 2, **settings}))
    assert files(out) == before


def test_other_weights_under_the_same_name_are_refused(data: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    config = train_settings(data, tmp_path / "run", model=str(model), max_steps=1)
    train(config)
    shutil.rmtree(tmp_path / "run" / "final")
    _nudge(model)
    with pytest.raises(UserError, match="was begun from other weights"):
        train(config)


def _nudge(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight += 0.01
    model.save_pretrained(folder)


def test_a_damaged_shard_without_signal_is_found_before_its_groups_count(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    selected = select

    def select_without_the_second(index: Any, *arguments: Any) -> Any:
        selection = selected(index, *arguments)
        sizes = np.diff(index.offsets)
        selection.trained_R[np.repeat(index.path_of_group == 1, sizes)] = False
        return selection

    monkeypatch.setattr("gfttrain.prepare.select", select_without_the_second)
    path = copy / "data/train-00001-of-00003.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"train-00001-of-00003.parquet: (damaged|cannot be read)"):
        train(train_settings(copy, tmp_path / "run"))
