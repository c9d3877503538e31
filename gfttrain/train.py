"""`gft train`: index -> plan -> stream -> update.

Read `_train` downward. What is found out before a model is loaded is prepare.py's, what a checkpoint holds
checkpoint.py's, what a step reports metrics.py's, how a model is loaded and sharded model.py's.
"""

import fcntl
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from gftdata.engines.hf import HfEngine
from gftdata.errors import UserError
from gftdata.index import Index
from gftdata.locations import checked_shards
from gftdata.manifest import Manifest
from gftdata.store import hold
from gftdata.tokens import Tokenizer
from gftdata.types import SELF
from gfttrain import checkpoint, metrics, watch
from gfttrain.benchmarks import read_questions
from gfttrain.config import TrainConfig, TrainEvalConfig
from gfttrain.curves import read_history
from gfttrain.distributed import World, agree, any_over, gather_json, join, leave, stop_on_signals, sum_over, together
from gfttrain.estimates import standard_error
from gfttrain.evaluate import measure_engine
from gfttrain.fit import memory_notice, with_limit, with_micro_batches
from gfttrain.loggers import open_loggers
from gfttrain.model import (
    Policy,
    autocast,
    compute_dtype,
    export,
    load_for_training,
    no_losses,
    reduce_now,
    self_check,
    trained_state,
    with_weights,
)
from gfttrain.objective import token_losses
from gfttrain.plan import Pack, Step, lay_out
from gfttrain.prepare import Prepared, make_optimizer, make_scheduler, prepare, write_run_file
from gfttrain.runs import FINAL, LOCK, METRICS
from gfttrain.stream import Batch, Example, ShardReader, collate, read_ahead

PROBE_TOKENS = 2048  # response tokens, about, of the look at the stored log-probs before the first step
FILLER_TOKENS = 64
CHECKED_RESPONSES = 4  # of each of two groups, in the self-check of the packed layout


class Stopped(Exception):
    """A signal asked the run to stop, and it is saved."""


class Diverged(UserError):
    """The run would not end well, and is saved.

    A loss or gradient is no number: nothing was updated, and the state before that step is there. Or evaluations say
    that the model gets worse (watch.py): the state after that step is.
    """


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, for whoever shows progress."""

    kind: Literal["notice", "start", "step", "checkpoint"]
    step: int
    num_steps: int
    metrics: metrics.Metrics
    notices: tuple[str, ...] = ()


Listener = Callable[[Event], None]


def train(config: TrainConfig, on_event: Listener = lambda event: None) -> Path:
    """Run or resume training, as one of the ranks that the environment says; returns the folder of the final model.

    The gradient of a step does not depend on how it is cut into micro-batches or over ranks: every token's loss is
    divided by N, the response tokens of the whole step. A resumed run ends with the same weights, bit by bit, as one
    never stopped (on the same number of ranks and the same kind of device).

    Raises UserError, and Stopped after SIGTERM or SIGUSR1, when the state is saved.
    """
    with (
        stop_on_signals() as stop_requested
    ):  # from here on: a signal while the model loads must not end one rank alone
        world = join(config.device)
        listener = on_event if world.rank == 0 else lambda event: None
        try:
            with together(world):
                prepared = prepare(config)
                fitted = with_micro_batches(config, prepared, world.device, world.size)
            limits = gather_json(world, fitted.batch.limit)  # devices may differ, and the layout must not
            fitted = with_limit(fitted, min(limits))
            try:
                with ExitStack() as held:
                    return _train(fitted, prepared, world, stop_requested, listener, held)
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                raise _out_of_memory(fitted, error) from None
        finally:
            leave(world)


def _train(
    config: TrainConfig,
    prepared: Prepared,
    world: World,
    stop_requested: Callable[[], bool],
    on_event: Listener,
    held: ExitStack,
) -> Path:
    out, steps, index, objective = Path(config.out), prepared.steps, prepared.index, config.objective
    if prepared.finished:
        return out / FINAL
    if (tight := memory_notice(config, prepared, world.device, world.size)) is not None:
        # before the model is loaded: a CPU's processes are killed without a word where memory runs out
        on_event(Event("notice", prepared.first_step, len(steps), {}, (tight,)))
    torch.manual_seed(config.seed)
    policy = load_for_training(config, world)
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(config, parameters)
    scheduler = make_scheduler(config, optimizer, len(steps))
    locate = checked_shards(prepared.shards)
    vocab_size = policy.model.config.get_text_config().vocab_size
    reader = ShardReader(index, prepared.selection, config.batch.shuffle_row_groups, locate, vocab_size)
    with together(world):
        if world.rank == 0:  # what is in no step is never touched, and yet has its part in what the steps are
            reader.check(prepared.unscheduled_shards)
    start_notices = list(prepared.notices)
    if prepared.first_step == 0:
        start_notices += _look_before(config, prepared, world, policy, reader)
    old_logprobs: dict[str, torch.Tensor] = {}
    if prepared.resume_from is not None:
        old_logprobs = checkpoint.restore(prepared.resume_from, world, policy, optimizer, scheduler)
    # nothing was written before this line: whatever is wrong with the model or the settings has shown by now
    with together(world):
        if world.rank == 0:
            _alone(out, prepared, held)
            write_run_file(config, out)
            metrics.cut_back(out / METRICS, prepared.first_step or -1)  # begun anew: step 0 is reported again too
            if 0 < prepared.first_step < len(steps):  # what ended it is said again, and not trained past
                ended = _is_worse(config, out, prepared.first_step, len(steps))
                if ended is not None:
                    raise ended
    on_event(Event("start", prepared.first_step, len(steps), {}, tuple(start_notices)))

    def save(step: int) -> None:
        position = checkpoint.Position(step, prepared.schedule_hash)
        keep = config.checkpoint.keep
        checkpoint.save(out, position, world, policy, optimizer, scheduler, old_logprobs, keep)
        on_event(Event("checkpoint", step, len(steps), {}))

    with ExitStack() as stack:
        loggers = config.loggers if world.rank == 0 else ()
        settings = config.model_dump(mode="json")
        log = stack.enter_context(open_loggers(loggers, out, settings, first_step=prepared.first_step))
        works = stack.enter_context(read_ahead(_works(config, prepared, world, reader)))
        if config.evaluation is not None and prepared.first_step == 0:
            found = _evaluate(config, config.evaluation, policy, prepared.tokenizer, world)
            if world.rank == 0:
                at_start: metrics.Metrics = {"step": 0, "epoch": 0, **found}
                metrics.append_line(out / METRICS, at_start)
                log(at_start)
        for number in range(prepared.first_step, len(steps)):
            began = time.perf_counter()
            step = steps[number]
            work, waited = _next(works)
            while work.purpose == "refresh":
                if work.first:
                    old_logprobs = {}
                old_logprobs |= _logprobs_of(config, policy, world, work.batches)
                work, more = _next(works)
                waited += more

            sums = metrics.TokenSums(index.source_names, objective, world.device)
            token_records: list[tuple[Batch, torch.Tensor]] = []
            for place, made in enumerate(work.batches):
                batch = made.to(world.device)
                reduce_now(policy, last=place + 1 == len(work.batches), world=world, once=config.reduce_once)
                old_N = _old_logprobs(batch, old_logprobs)

                def losses(logprobs_C: torch.Tensor, chunk: slice, b: Batch = batch, old: torch.Tensor = old_N) -> Any:
                    if not len(b.responses_R):  # nothing of this rank: it only keeps the others company
                        return logprobs_C * 0.0
                    return token_losses(
                        objective, logprobs_C, b.advantages_N[chunk], b.ref_logprobs_N[chunk], old[chunk]
                    )

                with autocast(config, world.device):
                    total, losses_N, logprobs_N, entropy_N = policy(batch, losses)
                (total / max(1, step.num_loss_tokens)).backward()
                if len(batch.responses_R):
                    sums.add(
                        losses_N,
                        logprobs_N,
                        entropy_N,
                        batch.advantages_N,
                        batch.ref_logprobs_N,
                        old_N,
                        batch.source_codes_N,
                    )
                    token_records.append((made, losses_N))

            # a step without any signal still moves momentum and weight decay, so its gradients are zeros, not None
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.optim.max_grad_norm)
            grad_norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
            report = sums.means(step.num_loss_tokens, lambda tensor: sum_over(world, tensor))
            if not (math.isfinite(float(report["loss"] or 0)) and math.isfinite(grad_norm)):  # type: ignore[arg-type]
                optimizer.zero_grad(set_to_none=True)
                if number > prepared.first_step:
                    save(number)
                agree(world, _not_finite(report, grad_norm, number, prepared, world, token_records))
            lr = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)

            seconds = time.perf_counter() - began
            if _samples_reference(prepared.manifests) and f"log_ratio/{SELF}" in report:
                report["kl_ref_to_model"] = -float(report[f"log_ratio/{SELF}"])  # type: ignore[arg-type]
            report = {
                "step": number + 1,
                "epoch": step.epoch,
                **report,
                "grad_norm": grad_norm,
                "grad_clipped": int(grad_norm > config.optim.max_grad_norm),
                "lr": lr,
                "tokens_per_second": float(report["computed_tokens"] or 0) / seconds,  # type: ignore[arg-type]
                "seconds": seconds,
                "data_wait_fraction": waited / seconds,
                **metrics.data_metrics(index, prepared.selection, step),
            }
            evaluated = config.evaluation is not None and (number + 1) % config.evaluation.every_steps == 0
            if config.evaluation is not None and evaluated:
                report |= _evaluate(config, config.evaluation, policy, prepared.tokenizer, world)
            if world.rank == 0:
                metrics.append_line(out / METRICS, report)
                log(report)
            on_event(Event("step", number + 1, len(steps), report))
            stopping = any_over(world, stop_requested())
            # also after the last step: a failing export must not cost the run
            if (number + 1) % config.checkpoint.every_steps == 0 or number + 1 == len(steps) or stopping:
                save(number + 1)
            if stopping and number + 1 < len(steps):
                raise Stopped(f"stopped after step {number + 1} of {len(steps)} and saved; the same command continues")
            if evaluated and number + 1 < len(steps):
                worse: Diverged | None = None
                with together(world):
                    if world.rank == 0:
                        worse = _is_worse(config, out, number + 1, len(steps))
                if any_over(world, worse is not None):
                    save(number + 1)
                    agree(world, worse)

    state = trained_state(policy)
    with together(world):
        if world.rank == 0:
            export(state, config, prepared.tokenizer, out / FINAL)
    return out / FINAL


def _alone(out: Path, prepared: Prepared, held: ExitStack) -> None:
    """Keep other processes out of the run folder. Raises UserError where one is in it, or was since the look at it."""
    out.mkdir(parents=True, exist_ok=True)
    lock = held.enter_context((out / LOCK).open("w"))
    hold(lock, fcntl.LOCK_EX, f"{out}: another gft train is writing there; wait, or name another folder (out)")
    if (out / FINAL).is_dir() or checkpoint.latest(out) != prepared.resume_from:
        raise UserError(f"{out}: another gft train has gone on there meanwhile; the same command goes on from it")


@dataclass(frozen=True, slots=True)
class Work:
    """The micro-batches of one step, to train on or, first, to take the old policy's log-probs of."""

    purpose: Literal["train", "refresh"]
    batches: list[Batch]
    first: bool = False  # of a window of `refresh_every` steps


def _works(config: TrainConfig, prepared: Prepared, world: World, reader: ShardReader) -> Iterator[Work]:
    """In the order in which `train` asks for it. Runs in the read-ahead thread."""

    def batches(step: Step) -> list[Batch]:
        reader.check(reader.shards_of(step.groups))  # also those whose groups here have no signal: they count in N
        ranks = lay_out(prepared.index, prepared.selection, step, config.batch, prepared.cost, world.size)
        return [_collate(config, reader, pack) for pack in ranks[world.rank]]

    every = config.objective.refresh_every
    for number in range(prepared.first_step, len(prepared.steps)):
        if config.objective.old_policy == "refreshed" and number % every == 0:
            for ahead in range(number, min(number + every, len(prepared.steps))):
                yield Work("refresh", batches(prepared.steps[ahead]), first=ahead == number)
        yield Work("train", batches(prepared.steps[number]))


def _collate(config: TrainConfig, reader: ShardReader, pack: Pack) -> Batch:
    if pack:
        return collate(reader.examples(pack), config.batch.layout)
    # the other ranks have one micro-batch more, and FSDP wants company: a token that counts for nothing, after a prompt
    # of no unusual length, for which a compiled model would be compiled once more
    prompt, token = np.zeros(FILLER_TOKENS, np.int32), np.zeros(1, np.int32)
    nobody = Example(prompt, (token,), (np.zeros(1, np.float32),), np.zeros(1), np.zeros(1, np.int32), (0,))
    return replace(collate([nobody], config.batch.layout), responses_R=np.empty(0, np.int64))


def _next(works: Iterator[Work]) -> tuple[Work, float]:
    """The next work, and the seconds that it was waited for."""
    began = time.perf_counter()
    return next(works), time.perf_counter() - began


def _old_logprobs(batch: Batch, old_logprobs: dict[str, torch.Tensor]) -> torch.Tensor:
    if not old_logprobs or not len(batch.responses_R):
        return batch.ref_logprobs_N
    parts = [old_logprobs[str(response)] for response in batch.responses_R.tolist()]
    return torch.cat(parts).to(batch.ref_logprobs_N.device)


@torch.no_grad()
def _logprobs_of(
    config: TrainConfig, policy: Policy, world: World, batches: Sequence[Batch]
) -> dict[str, torch.Tensor]:
    """log pi of the current model: response -> [T], kept on the CPU."""
    found: dict[str, torch.Tensor] = {}
    for batch in batches:
        with autocast(config, world.device):
            logprobs_N = policy(batch.to(world.device), no_losses)[2].cpu()
        if len(batch.responses_R):
            parts = logprobs_N.split(batch.lengths_R.tolist())
            found |= {str(r): part.clone() for r, part in zip(batch.responses_R.tolist(), parts, strict=True)}
    return found


@torch.no_grad()
def _look_before(
    config: TrainConfig, prepared: Prepared, world: World, policy: Policy, reader: ShardReader
) -> list[str]:
    """Before the first step: that packing keeps responses apart, and that the stored log-probs are this model's.

    Returns the noise floor, for the log. Raises UserError where either fails.
    """
    trained_R = prepared.selection.trained_R
    step = next((step for step in prepared.steps if trained_R[_responses(prepared.index, step)].any()), None)
    if step is None:  # none of these few steps computes anything
        return []
    pieces = [
        piece
        for rank in lay_out(prepared.index, prepared.selection, step, config.batch, prepared.cost)
        for pack in rank
        for piece in pack
    ]
    dtype = compute_dtype(config, world.device)
    with together(world):
        probe, tokens = [], 0
        for piece in pieces:
            probe.append(piece)
            tokens += int(prepared.index.num_tokens[list(piece.responses)].sum())
            if tokens >= PROBE_TOKENS:
                break
        if config.batch.layout != "padded":
            few = [replace(piece, responses=piece.responses[:CHECKED_RESPONSES]) for piece in probe[:2]]
            examples = reader.examples(tuple(few))
            self_check(policy, examples, config.batch.layout, lambda: autocast(config, world.device), dtype)
        gaps = []
        for piece in probe:
            batch = collate(reader.examples((piece,)), config.batch.layout).to(world.device)
            with autocast(config, world.device):
                gaps.append((policy(batch, no_losses)[2] - batch.ref_logprobs_N).abs())
        gap_N = torch.cat(gaps).double()
        mean, high = float(gap_N.mean()), float(gap_N.quantile(0.95))
        if not mean <= config.max_reference_gap:
            raise UserError(
                f"the stored reference log-probs are not those of {config.model}: over {len(gap_N):,} tokens they "
                f"differ by {mean:.3f} nats on average (95th percentile {high:.3f}), allowed is max_reference_gap="
                f"{config.max_reference_gap}; is it another model, another chat template, or were log-probs stored "
                "that decoding gave at another temperature? `gft rescore` writes them anew; for a model that was meant "
                "to move on, raise max_reference_gap"
            )
    return [f"stored and recomputed log-probs differ by {mean:.2g} nats a token (95th percentile {high:.2g})"]


def _responses(index: Index, step: Step) -> Any:
    return np.concatenate([np.arange(index.offsets[g], index.offsets[g + 1]) for g in step.groups])


def _evaluate(
    config: TrainConfig, settings: TrainEvalConfig, policy: Policy, tokenizer: Tokenizer, world: World
) -> metrics.Metrics:
    """pass@1 of the model as it is, and what its samples are like.

    Several ranks: rank 0 evaluates a copy of its own while the others wait.
    """
    state = trained_state(policy) if world.size > 1 else {}
    found: metrics.Metrics = {}
    with together(world):
        if world.rank == 0:
            model = policy.model
            if world.size > 1:
                model, _ = with_weights(config, state, compute_dtype(config, world.device))
                model.to(world.device)
            sizes = {"batch_size": settings.engine.batch_size, "batch_tokens": settings.engine.batch_tokens}
            model.eval()
            # cached decoding has shapes of its own, which compiled layers need not learn
            with autocast(config, world.device), torch.compiler.set_stance("force_eager"):
                engine = HfEngine(model, tokenizer, **sizes)
                questions = read_questions(settings.prompts, settings.reward, tokenizer)
                measured = measure_engine(settings, questions, engine, config.seed)
            found = {
                "eval/pass@1": measured.pass_at[1].value,
                "eval/pass@1_se": standard_error(measured.pass_at[1]),
                "eval/mean_reward": measured.mean_reward.value,
                "eval/mean_tokens": measured.mean_tokens,
                "eval/truncated": measured.truncated,
            }
            if measured.entropy is not None:
                found["eval/entropy"] = measured.entropy
    policy.train()
    return found


def _is_worse(config: TrainConfig, out: Path, step: int, num_steps: int) -> Diverged | None:
    """Says why the run should not go on, where its evaluations say so. On rank 0."""
    if config.evaluation is None or not config.evaluation.stop_when_worse:
        return None
    why = watch.divergence(watch.evaluations(read_history(out / METRICS).series))
    if not why:
        return None
    return Diverged(
        f"stopped after step {step} of {num_steps}, and saved: {why}. Lower optim.lr, set objective.advantage_floor, "
        "or use groups with more right answers (filter.min_pass, a teacher); to go on all the same: the same command "
        "with --set evaluation.stop_when_worse=false"
    )


def _not_finite(
    report: metrics.Metrics,
    grad_norm: float,
    number: int,
    prepared: Prepared,
    world: World,
    token_records: Sequence[tuple[Batch, torch.Tensor]],
) -> Diverged:
    """Says which groups have a loss that is not a number."""
    index = prepared.index
    bad: list[int] = []
    for batch, losses_N in token_records:
        finite = [bool(part.isfinite().all()) for part in losses_N.split(batch.lengths_R.tolist())]
        bad += [r for r, fine in zip(batch.responses_R.tolist(), finite, strict=True) if not fine]
    groups = sorted({int(g) for found in gather_json(world, bad) for g in _groups_of(index, found)})
    where = "; ".join(index.place_of(group) for group in groups[:3])
    return Diverged(
        f"step {number + 1}: loss {report['loss']}, gradient norm {grad_norm}; nothing was updated, and the state "
        "before this step is saved. "
        + (f"Not finite in {len(groups)} groups: {where}. " if groups else "Every loss is finite. ")
        + "Lower optim.lr, or look at these groups and start again from an earlier checkpoint"
    )


def _groups_of(index: Index, responses: Sequence[int]) -> Any:
    return np.searchsorted(index.offsets, np.array(responses, np.int64), side="right") - 1


def _samples_reference(manifests: Sequence[Manifest]) -> bool:
    """Whether self samples follow the reference itself: drawn at temperature 1 and top-p 1."""
    for manifest in manifests:
        own = manifest.recipe.get("responses", {}).get("self", {}).get("sampling", {})
        if own.get("temperature") != 1.0 or own.get("top_p") != 1.0 or own.get("stop"):
            return False
    return True


def _is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, of a CPU (torch has no type for it), or of numpy."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _out_of_memory(config: TrainConfig, error: BaseException) -> UserError:
    lower = config.batch.limit // 2
    more = "" if config.gradient_checkpointing is True else ", or set gradient_checkpointing=true"
    said = str(error).rpartition("DefaultCPUAllocator: ")[2]
    if not isinstance(error, MemoryError):  # numpy's is one sentence, with full stops in its numbers
        said = said.split(". ")[0]
    return UserError(
        f"out of memory with micro-batches of {config.batch.limit} tokens: {said}; set batch.micro_batch_tokens={lower}"
        f"{more} (the update stays the same), or use more GPUs (--nproc) or lora. The same command continues from the "
        "last checkpoint"
    )
