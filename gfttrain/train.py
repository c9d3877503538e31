"""`gft train`: index -> plan -> stream -> update.

Read it downward: `prepare` finds every mistake and plans the run without loading a model, `train` is the loop.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import get_scheduler

from gftdata.config import recipe_differences
from gftdata.engines.hf import pick_device
from gftdata.errors import UserError
from gftdata.models import model_revision
from gftdata.shards import Index, Manifest, check_writable, read_index, read_manifest, shard_paths, write_atomic
from gftdata.tokens import Tokenizer, load_tokenizer
from gfttrain import checkpoint, metrics
from gfttrain.config import BatchConfig, TrainConfig
from gfttrain.model import autocast, check_packing, export, load_for_training, response_logprobs
from gfttrain.objective import token_losses
from gfttrain.plan import (
    Row,
    Selection,
    Step,
    check_selection,
    make_schedule,
    micro_batches,
    schedule_hash,
    select,
)
from gfttrain.stream import Batch, ShardReader, collate

FINAL, RUN, METRICS = "final", "run.json", "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that has been found sound: its data, its schedule, and where it goes on."""

    tokenizer: Tokenizer
    index: Index
    selection: Selection
    steps: tuple[Step, ...]
    schedule_hash: str
    resume_from: Path | None
    first_step: int
    finished: bool
    notices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, for whoever shows progress."""

    kind: Literal["start", "step", "checkpoint"]
    step: int
    num_steps: int
    metrics: metrics.Metrics
    notices: tuple[str, ...] = ()


Listener = Callable[[Event], None]


def prepare(config: TrainConfig) -> Prepared:
    """Check everything that can be checked and plan the run. Writes nothing. Raises UserError."""
    folders = [Path(folder) for folder in config.data]
    manifests = [read_manifest(folder) for folder in folders]
    tokenizer = load_tokenizer(config.model)
    notices = [note for pair in zip(folders, manifests, strict=True) for note in _check_model(config, tokenizer, *pair)]
    index = read_index([path for pair in zip(folders, manifests, strict=True) for path in shard_paths(*pair)])
    selection = select(index, config.objective)
    skip_unjudged = config.unjudged_groups == "skip"
    check_selection(index, selection, config.objective, skip_unjudged=skip_unjudged)
    steps = make_schedule(
        index,
        selection,
        config.batch,
        seed=config.seed,
        epochs=config.epochs,
        max_steps=config.max_steps,
        skip_unjudged=skip_unjudged,
    )
    digest = schedule_hash(index, selection, steps, [record.sha256 for m in manifests for record in m.shards])
    out = Path(config.out)
    _check_output(config, out)
    resume_from = checkpoint.latest(out)
    position = checkpoint.read_position(resume_from) if resume_from else checkpoint.Position(0, digest)
    if position.schedule_hash != digest:
        raise UserError(
            f"{resume_from}: was saved on other data: the schedule of steps differs; restore the data, or name "
            "another run folder (out)"
        )
    _scheduler(config, _optimizer(config, [torch.zeros(1)]), len(steps))  # a wrong name is found here
    finished = (out / FINAL).is_dir()
    return Prepared(tokenizer, index, selection, steps, digest, resume_from, position.step, finished, tuple(notices))


def train(config: TrainConfig, on_event: Listener = lambda event: None) -> Path:
    """Run or resume training; returns the folder of the final model.

    The gradient of a step does not depend on how it is cut into micro-batches: every token's loss is divided by N, the
    response tokens of the whole step. A resumed run ends with the same weights, bit by bit, as one never stopped (on
    the same kind of device).
    """
    prepared = prepare(config)
    out, steps = Path(config.out), prepared.steps
    if prepared.finished:
        return out / FINAL
    torch.manual_seed(config.seed)
    device = pick_device(config.device)
    model = load_for_training(config, device)
    optimizer = _optimizer(config, model.parameters())
    scheduler = _scheduler(config, optimizer, len(steps))
    reader = ShardReader(prepared.index, prepared.selection, config.batch.shuffle_row_groups)
    if config.batch.layout == "packed" and (rows := _longest_rows(prepared)):
        check_packing(model, reader.examples(rows))
    old_logprobs: dict[str, torch.Tensor] = {}
    if prepared.resume_from is not None:
        old_logprobs = checkpoint.restore(prepared.resume_from, model, optimizer, scheduler, device)
    # nothing was written before this line: whatever is wrong with the model or the settings has shown by now
    write_run_file(config, out)
    metrics.cut_back(out / METRICS, prepared.first_step)
    on_event(Event("start", prepared.first_step, len(steps), {}, prepared.notices))

    for number in range(prepared.first_step, len(steps)):
        began = time.perf_counter()
        step = steps[number]
        if config.objective.old_policy == "refreshed" and number % config.objective.refresh_every == 0:
            window = range(number, min(number + config.objective.refresh_every, len(steps)))
            old_logprobs = _old_policy_logprobs(config, prepared, reader, model, device, window)

        sums = metrics.TokenSums(prepared.index.source_names, device)
        for rows, batch in _batches(config, prepared, reader, step, device):
            with autocast(config, device):
                logprobs_N, entropy_N = response_logprobs(model, batch)
            old_N = batch.ref_logprobs_N
            if old_logprobs:
                old_N = torch.cat([old_logprobs[row.key] for row in rows]).to(device)
            losses_N = token_losses(config.objective, logprobs_N, batch.advantages_N, batch.ref_logprobs_N, old_N)
            (losses_N.sum() / max(1, step.num_loss_tokens)).backward()
            sums.add(losses_N, logprobs_N, entropy_N, batch.ref_logprobs_N, batch.source_codes_N, config.objective.tau)

        # a step without any signal still moves momentum and weight decay, so its gradients are zeros, not None
        for parameter in model.parameters():
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.max_grad_norm).item()
        report = sums.means(step.num_loss_tokens, rectified=config.objective.coefficient == "rectified")
        _refuse_not_finite(report["loss"], grad_norm, number, prepared)
        lr = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)

        seconds = time.perf_counter() - began
        report = {
            "step": number + 1,
            "epoch": step.epoch,
            **report,
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens_per_second": (report["computed_tokens"] or 0) / seconds,
            "seconds": seconds,
            **metrics.data_metrics(prepared.index, prepared.selection, step),
        }
        metrics.append_line(out / METRICS, report)
        on_event(Event("step", number + 1, len(steps), report))
        # also after the last step: a failing export must not cost the run
        if (number + 1) % config.checkpoint.every_steps == 0 or number + 1 == len(steps):
            position = checkpoint.Position(number + 1, prepared.schedule_hash)
            checkpoint.save(out, position, model, optimizer, scheduler, old_logprobs, config.checkpoint.keep)
            on_event(Event("checkpoint", number + 1, len(steps), {}))

    export(model, prepared.tokenizer, config.model, out / FINAL)
    return out / FINAL


def write_run_file(config: TrainConfig, out: Path) -> None:
    """Mark a folder as this run's, with the resolved config and the exact base model."""
    run = {
        "recipe": config.recipe(),
        "config": config.model_dump(mode="json"),
        "revision": model_revision(config.model),
    }
    write_atomic(out / RUN, json.dumps(run, indent=2) + "\n")


def _check_model(config: TrainConfig, tokenizer: Tokenizer, folder: Path, manifest: Manifest) -> list[str]:
    reference = next((record for record in manifest.models if record.role == "reference"), None)
    if reference is None:
        raise UserError(f"{folder}: its manifest names no reference model")
    if tokenizer.hash != manifest.tokenizer.hash:
        raise UserError(
            f"{folder}: its token ids come from the tokenizer of {reference.name}, and {config.model} has another; "
            "train the model that the data was generated for, or generate it again with this one"
        )
    notices = []
    if tokenizer.template_hash != manifest.tokenizer.template_hash:
        notices.append(f"{folder}: was generated with another chat template than that of {config.model}")
    if model_revision(config.model) != reference.revision:
        notices.append(f"{folder}: its reference is {reference.name}, {config.model} has other weights")
    return notices


def _check_output(config: TrainConfig, out: Path) -> None:
    check_writable(out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        run = json.loads((out / RUN).read_bytes())
        recipe, revision = run["recipe"], run["revision"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{out}: not empty and not a run of gft train; name another folder (out)") from None
    differing = recipe_differences(recipe, config.recipe())
    if differing:
        raise UserError(f"{out}: was begun with another config: {differing}; or name another folder (out)")
    if revision != model_revision(config.model):
        raise UserError(f"{out}: was begun from other weights of {config.model}; name another folder (out)")


def _optimizer(config: TrainConfig, parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
    optim = config.optim
    return torch.optim.AdamW(parameters, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay)


def _scheduler(config: TrainConfig, optimizer: torch.optim.Optimizer, num_steps: int) -> Any:
    name = config.optim.schedule
    warmup = math.ceil(config.optim.warmup_ratio * num_steps)
    try:
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=num_steps)
    except (ValueError, KeyError, TypeError) as error:  # TypeError: it needs a setting of its own
        raise UserError(f"optim.schedule {name} cannot be used: {error}") from None
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        raise UserError(f"optim.schedule {name} follows a metric; use one of the number of steps, such as cosine")
    return scheduler


def _longest_rows(prepared: Prepared) -> list[Row]:
    """The two longest responses of the first step that has any."""
    everything = BatchConfig(micro_batch_tokens=2**62)
    steps = (micro_batches(prepared.index, prepared.selection, step, everything) for step in prepared.steps)
    return next((cuts[0][:2] for cuts in steps if cuts), [])


def _batches(
    config: TrainConfig, prepared: Prepared, reader: ShardReader, step: Step, device: torch.device
) -> Iterator[tuple[list[Row], Batch]]:
    for rows in micro_batches(prepared.index, prepared.selection, step, config.batch):
        yield rows, collate(reader.examples(rows), config.batch.layout).to(device)


@torch.no_grad()
def _old_policy_logprobs(
    config: TrainConfig, prepared: Prepared, reader: ShardReader, model: Any, device: torch.device, window: range
) -> dict[str, torch.Tensor]:
    """log pi of the current model on the coming steps' responses: response -> [T], kept on the CPU."""
    found: dict[str, torch.Tensor] = {}
    for number in window:
        for rows, batch in _batches(config, prepared, reader, prepared.steps[number], device):
            with autocast(config, device):
                logprobs_N, _ = response_logprobs(model, batch)
            lengths = [int(prepared.index.num_tokens[prepared.index.offsets[r.group] + r.response]) for r in rows]
            found |= {row.key: part.clone() for row, part in zip(rows, logprobs_N.cpu().split(lengths), strict=True)}
    return found


def _refuse_not_finite(loss: float | int | None, grad_norm: float, number: int, prepared: Prepared) -> None:
    if loss is not None and math.isfinite(loss) and math.isfinite(grad_norm):
        return
    raise UserError(
        f"step {number + 1}: loss {loss}, gradient norm {grad_norm}; nothing was updated. Lower optim.lr, or look at "
        f"the step's groups (the first is number {int(prepared.steps[number].groups[0])} of the data)"
    )
