"""Training on one CUDA GPU: correct first, then tokens a second, memory and MFU, one part of the trainer at a time.

    python benchmarks/gpu.py --write              # under 10 minutes on an H100; appends to benchmarks/RESULTS.md
    python benchmarks/gpu.py --only 1.5b          # one of the models; --skip-checks leaves the first part out
    python benchmarks/gpu.py --smoke              # on a CPU with tiny models, seconds: says nothing of speed

Needs torch 2.11+ with CUDA and triton, transformers, numpy, pyarrow, pyyaml, safetensors, and of our other dependencies
only `pip install pydantic pebble` (with what they need: pydantic-core, annotated-types, typing-inspection). Where the
package itself is not installed, put PYTHONPATH=. before the command. Nothing is downloaded.

**Checks.** Attention (FlexAttention on a GPU, forward and backward, sliding windows and caps included) against softmax
over the definition of the mask in float64; the fused head against a naive float64 one, where it may be at most twice as
far off as the naive one in its own width; a model of two layers, responses sharing a prompt and fused head against a
padded row for each and whole logits. A difference above its tolerance ends the program.

**Speed.** Random weights of the shape of Qwen2.5-1.5B and 7B, random tokens, GFT. One step is the trainer's own:
plan.lay_out, stream.collate, Policy, token_losses, its autocast (bfloat16) and its optimizer; batches lie ready in main
memory, so reading shards is not in it. What a step is for each model, the table says: 7B with float32 weights and Adam
takes 16 bytes a weight, 122 GB, so there it is forward and backward with bfloat16 weights and gradients and no update.
Rows, each with what the ones before it have:

    padded           a row for each response, transformers' own attention (sdpa), all logits in memory: the authors' way
    packed           responses one after the other with their prompts, no padding
    shared prefix    each prompt once for the responses of its group
    + fused head     logits of one chunk at a time
    + compile        torch.compile of the decoder layers

Seconds are the median of the measured steps, between two torch.cuda.synchronize; the first steps, which compile, are
not measured. Positions are those that a step computes, padding included. Peak is torch.cuda.max_memory_allocated. The
mean log-prob of the first step must be the same in all rows of a model. Where memory does not suffice the row says so,
and the next one has half the tokens in a micro-batch (the update is the same).

MFU = FLOP / seconds / the device's dense bfloat16 peak, with (gfttrain.model.training_cost)

    FLOP = 6 * weights of the layers * positions + 6 * V * D * response tokens
           + 12 * layers * heads * head size * pairs of a position and one that it sees

of the row's own positions without padding: sharing a prompt lowers FLOP as it lowers seconds. Logits of prompts, masked
pairs and padding are not needed and not counted, though some rows compute them.
"""

import argparse
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, MistralConfig, Qwen2Config

from gftdata.index import Index
from gfttrain.attention import NAME, Segments, attend, make_segments, visible
from gfttrain.config import TrainConfig
from gfttrain.head import Head, fused_head
from gfttrain.model import Policy, autocast, decoder_layers, training_cost
from gfttrain.objective import token_losses
from gfttrain.plan import Layout, Pack, lay_out, layout_totals, make_schedule, select
from gfttrain.prepare import make_optimizer
from gfttrain.stream import Batch, Example, collate

RESULTS = Path(__file__).resolve().with_name("RESULTS.md")
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16 FLOP/s; first match
WARM_UP = 2  # steps of each row that are not measured
SAME_LOGPROB = 0.02  # nats: mean log-probs of the rows of a model, in bfloat16
OUT_OF_MEMORY = "out of memory"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # |found - expected| / |expected|
SOURCES = ("expert", "teacher:a", "teacher:a", "teacher:a", "self", "self", "self", "self")


# ---- what is measured


@dataclass(frozen=True, slots=True)
class Model:
    """A model's shape, and what a step of it is."""

    config: Qwen2Config
    update: bool  # float32 weights and AdamW; else bfloat16 weights and no update
    groups: int  # of a step
    micro_batch_tokens: int
    steps: int  # measured

    @property
    def says(self) -> str:
        kept = "float32 weights, bf16 autocast, forward + backward + clipping + AdamW"
        return kept if self.update else "bf16 weights and gradients, forward + backward, no update"


@dataclass(frozen=True, slots=True)
class Shape:
    """Groups of 8 responses, evenly spread from the shortest to the longest."""

    prompt: int
    shortest: int
    longest: int

    @property
    def lengths(self) -> list[int]:
        steps = len(SOURCES) - 1
        return [self.shortest + (self.longest - self.shortest) * k // steps for k in range(steps + 1)]

    def __str__(self) -> str:
        return f"{self.prompt} + 8 x {self.shortest}-{self.longest}"


@dataclass(frozen=True, slots=True)
class Variant:
    """A row."""

    name: str
    layout: Layout
    fused: bool = False
    compiled: bool = False


VARIANTS = (
    Variant("padded", "padded"),
    Variant("packed", "packed"),
    Variant("shared prefix", "shared_prefix"),
    Variant("+ fused head", "shared_prefix", fused=True),
    Variant("+ compile", "shared_prefix", fused=True, compiled=True),
)
SHAPES = (Shape(512, 256, 1024), Shape(150, 350, 1050))  # the second is the paper's: mean 700
SMOKE_SHAPES = (Shape(12, 6, 20),)


def qwen(vocab: int, width: int, inner: int, layers: int, heads: int, kv_heads: int, *, tied: bool) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
    )


def models(*, smoke: bool) -> dict[str, Model]:
    if smoke:
        tiny = {"width": 64, "inner": 96, "layers": 2, "heads": 4, "kv_heads": 2}
        return {
            "1.5b": Model(qwen(512, **tiny, tied=True), True, groups=2, micro_batch_tokens=256, steps=2),
            "7b": Model(qwen(512, **tiny, tied=False), False, groups=2, micro_batch_tokens=256, steps=2),
        }
    return {
        "1.5b": Model(qwen(151936, 1536, 8960, 28, 12, 2, tied=True), True, groups=4, micro_batch_tokens=8192, steps=5),
        "7b": Model(
            qwen(152064, 3584, 18944, 28, 28, 4, tied=False), False, groups=2, micro_batch_tokens=4096, steps=3
        ),
    }


# ---- data


def synthetic_index(shape: Shape, groups: int) -> Index:
    """The index of an imaginary shard; every group has a signal."""
    each = len(SOURCES)
    names = tuple(dict.fromkeys(SOURCES))
    number = np.arange(groups, dtype=np.int32)
    return Index(
        paths=(Path("imaginary.parquet"),),
        path_of_group=np.zeros(groups, np.int32),
        row_group_of_group=np.zeros(groups, np.int32),
        row_of_group=number,
        offsets=np.arange(0, (groups + 1) * each, each, dtype=np.int64),
        num_prompt_tokens=np.full(groups, shape.prompt, np.int32),
        num_tokens=np.tile(np.array(shape.lengths, np.int32), groups),
        rewards=np.tile(np.array([1, 1, 0, 1, 0, 1, 0, 0], np.float32), groups),
        source_names=names,
        source_codes=np.tile(np.array([names.index(s) for s in SOURCES], np.int32), groups),
    )


def random_ids(kind: int, number: int, length: int, vocab: int) -> Any:
    return np.random.default_rng([kind, number]).integers(0, vocab, length).astype(np.int32)


def examples_of(pack: Pack, index: Index, advantages_R: Any, vocab: int) -> list[Example]:
    """What a ShardReader would give; the same tokens whatever the layout."""
    return [
        Example(
            prompt_ids=random_ids(0, piece.group, int(index.num_prompt_tokens[piece.group]), vocab),
            response_ids=tuple(random_ids(1, r, int(index.num_tokens[r]), vocab) for r in piece.responses),
            ref_logprobs=tuple(np.zeros(index.num_tokens[r], np.float32) for r in piece.responses),
            advantages=advantages_R[list(piece.responses)],
            source_codes=index.source_codes[list(piece.responses)],
            responses=piece.responses,
        )
        for piece in pack
    ]


# ---- speed


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table, or why there is none."""

    model: str
    shape: Shape
    variant: str
    micro_batch_tokens: int
    problem: str | None = None
    response_tokens: int = 0  # of a step, as the others
    positions: int = 0
    flop: float = 0.0
    seconds: float = 0.0
    first_seconds: float = 0.0
    peak: float | None = None  # GiB
    logprob: float = 0.0  # mean of the first step

    def cells(self, peak_rate: float | None) -> str:
        start = f"| {self.shape} | {self.variant} | {self.micro_batch_tokens:,} |"
        if self.problem is not None:
            return f"{start} {self.problem} | | | | | | |"
        mfu = "-" if peak_rate is None else f"{self.flop / self.seconds / peak_rate:.1%}"
        memory = "-" if self.peak is None else f"{self.peak:.1f}"
        return (
            f"{start} {self.response_tokens / self.seconds:,.0f} | {self.positions:,} | {memory} | {mfu} "
            f"| {self.seconds:.3f} | {self.first_seconds:.1f} | {self.logprob:.3f} |"
        )


HEADER = (
    "| prompt + responses | | micro-batch tokens | response tok/s | positions a step | peak GiB | MFU | s a step "
    "| s first step | mean log-prob |\n|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"
)


def settings(model: Model, layout: Layout, micro_batch_tokens: int) -> TrainConfig:
    return TrainConfig(
        model="random weights",
        data=("random tokens",),
        out="nowhere",
        dtype="bfloat16",
        batch={"groups_per_step": model.groups, "micro_batch_tokens": micro_batch_tokens, "layout": layout},
    )


def outline(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def build(config: Any, dtype: torch.dtype, device: torch.device, layout: Layout, *, compiled: bool = False) -> Policy:
    """What gfttrain.model.load_for_training makes of a checkpoint, of random weights; always the same ones."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    if layout != "padded":
        model.set_attn_implementation(NAME)
    policy = Policy(model).train()
    if compiled:
        for layer in decoder_layers(model):
            layer.compile(dynamic=True)
    return policy


def run_micro_batch(policy: Policy, config: TrainConfig, batch: Batch, num_loss_tokens: int, *, fused: bool) -> Any:
    """Forward and backward. Returns the log-probs."""

    def losses(logprobs_C: torch.Tensor, chunk: slice) -> torch.Tensor:
        ref_C = batch.ref_logprobs_N[chunk]
        return token_losses(config.objective, logprobs_C, batch.advantages_N[chunk], ref_C, ref_C)

    with autocast(config, batch.input_ids_BL.device):
        total, _, logprobs_N, _ = policy(batch, losses, own_logits=not fused)
        if not fused:
            total = losses(logprobs_N, slice(None)).sum()
    (total / num_loss_tokens).backward()
    return logprobs_N.detach()


def problem_of(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    first = (str(error).splitlines() or [""])[0][:120].replace("|", "/")
    return f"failed: {type(error).__name__}: {first}"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(name: str, model: Model, shape: Shape, variant: Variant, policy: Policy, tokens: int) -> Row:
    """One row."""
    device = next(policy.parameters()).device
    config = settings(model, variant.layout, tokens)
    index = synthetic_index(shape, model.groups)
    selection = select(index, config.objective)
    (step,) = make_schedule(index, selection, config.batch, seed=0, epochs=1, max_steps=1, skip_unjudged=False)
    cost = training_cost(outline(model.config))
    (packs,) = lay_out(index, selection, step, config.batch, cost)
    totals = layout_totals(index, selection, [step], config.batch, cost, 1)
    vocab = model.config.vocab_size
    batches = [collate(examples_of(pack, index, selection.advantages_R, vocab), variant.layout) for pack in packs]
    parameters = list(policy.parameters())
    optimizer = make_optimizer(config, parameters) if model.update else None
    logprob_sum = torch.zeros((), device=device)
    times = []
    try:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for number in range(WARM_UP + model.steps):
            synchronize(device)
            began = time.perf_counter()
            for made in batches:
                batch = made.to(device)
                logprobs_N = run_micro_batch(policy, config, batch, step.num_loss_tokens, fused=variant.fused)
                if number == 0:
                    logprob_sum += logprobs_N.sum()
            if optimizer is not None:
                torch.nn.utils.clip_grad_norm_(parameters, config.optim.max_grad_norm)
                optimizer.step()
            policy.zero_grad(set_to_none=True)
            synchronize(device)
            times.append(time.perf_counter() - began)
    except Exception as error:  # said in the table; the other rows are still worth having
        policy.zero_grad(set_to_none=True)
        return Row(name, shape, variant.name, tokens, problem=problem_of(error))
    return Row(
        model=name,
        shape=shape,
        variant=variant.name,
        micro_batch_tokens=tokens,
        response_tokens=totals.response_tokens,
        positions=totals.computed_positions,
        flop=totals.flops,
        seconds=statistics.median(times[WARM_UP:]),
        first_seconds=times[0],
        peak=torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        logprob=float(logprob_sum) / totals.response_tokens,
    )


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure_variant(
    name: str, model: Model, shapes: Sequence[Shape], variant: Variant, device: torch.device, tokens: int, ends: float
) -> Iterator[Row]:
    """A variant's rows: one for each shape, and one more for each time that memory did not suffice."""
    dtype = torch.float32 if model.update else torch.bfloat16
    try:
        policy = build(model.config, dtype, device, variant.layout, compiled=variant.compiled)
    except torch.OutOfMemoryError:
        yield Row(name, shapes[0], variant.name, tokens, problem="out of memory: not even the weights fit")
        return
    start = (
        {key: value.detach().to("cpu", copy=True) for key, value in policy.named_parameters()} if model.update else {}
    )
    for shape in shapes:
        for limit in (tokens, tokens // 2, tokens // 4):
            if time.monotonic() > ends:
                yield Row(name, shape, variant.name, limit, problem="not run: the time was up (--minutes)")
                break
            with torch.no_grad():  # the first step of each row starts from the same weights
                for key, value in policy.named_parameters():
                    if key in start:
                        value.copy_(start[key])
            row = measure(name, model, shape, variant, policy, limit)
            release()
            yield row
            if row.problem != OUT_OF_MEMORY:
                break


def measure_all(options: argparse.Namespace, device: torch.device, ends: float) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    peak_rate = peak_of(device)
    for name, model in models(smoke=options.smoke).items():
        if options.only not in (None, name):
            continue
        rows = found.setdefault(name, [])
        print(f"\n{title(name, model, smoke=options.smoke)}\n\n{HEADER}", flush=True)
        tokens = options.micro_batch_tokens or model.micro_batch_tokens
        for variant in VARIANTS:
            shapes = SMOKE_SHAPES if options.smoke else SHAPES
            for row in measure_variant(name, model, shapes, variant, device, tokens, ends):
                rows.append(row)
                print(row.cells(peak_rate), flush=True)
            release()
    return found


def check_rows(rows: Sequence[Row]) -> None:
    """All rows of a model and shape did the same work, and none failed; out of memory is no failure."""
    failed = [row for row in rows if (row.problem or "").startswith("failed")]
    if failed:
        sys.exit(f"{len(failed)} rows failed, the first: {failed[0].model}, {failed[0].variant}: {failed[0].problem}")
    first: dict[Shape, Row] = {}
    for row in rows:
        if row.problem is None:
            one = first.setdefault(row.shape, row)
            if not abs(row.logprob - one.logprob) <= SAME_LOGPROB:
                sys.exit(
                    f"not the same work: mean log-prob {one.logprob:.4f} {one.variant}, {row.logprob:.4f} {row.variant}"
                )


# ---- checks


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-300))


def judge(what: str, found: float, allowed: float) -> None:
    print(f"{what:<78} {found:9.2e}  allowed {allowed:.1e}", flush=True)
    if not found <= allowed:
        sys.exit(f"{what}: {found:.3g} is above {allowed:.3g}")


def by_definition(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    window: int | None,
    cap: float | None,
) -> torch.Tensor:
    """softmax(q k) v over the mask. [1, L, H, D], as `attend`."""
    times = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~visible(segments, window), -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def check_attention(device: torch.device, *, smoke: bool) -> None:
    cases: list[tuple[torch.dtype, int | None, float | None]] = [
        (torch.float32, None, None),
        (torch.float32, 50, None),
        (torch.float32, None, 1.5),
        (torch.float32, 50, 1.5),
        (torch.bfloat16, None, None),
        (torch.bfloat16, 50, 1.5),
    ]
    packs = [  # prompts, and the responses' lengths of each
        ([70, 130], [[100, 50, 0, 77], [140, 1]]),
        ([257], [[300, 199, 64]]),
        ([1, 40, 33], [[200], [30, 31, 32], [129, 128, 127]]),
    ]
    for dtype, window, cap in cases:
        compiled_before = graphs()
        errors = []
        for prompts, responses in packs[: 1 if smoke else None]:
            segments = make_segments(prompts, responses)
            generator = torch.Generator().manual_seed(len(segments.position_L))
            shape = (1, len(segments.position_L))
            exact, narrow = [], []
            for heads in (6, 2, 2):  # position-major, heads transposed out, as transformers gives them
                drawn = torch.randn(*shape, heads, 64, generator=generator).to(dtype)
                exact.append(drawn.double().transpose(1, 2).requires_grad_())
                narrow.append(drawn.to(device).transpose(1, 2).requires_grad_())
            weights = torch.randn(*shape, 6, 64, generator=generator).to(dtype)
            wanted = by_definition(*exact, segments, window, cap)
            wanted_grads = torch.autograd.grad(wanted, exact, weights.double())
            there = segments.to(device)
            out, _ = attend(torch.nn.Module(), *narrow, None, sliding_window=window, softcap=cap, segments=there)
            grads = torch.autograd.grad(out, narrow, weights.to(device))
            errors.append([relative(a, b) for a, b in zip((out, *grads), (wanted, *wanted_grads), strict=True)])
        worst = [max(column) for column in zip(*errors, strict=True)]
        parts = ", ".join(f"{part} {error:.1e}" for part, error in zip(("out", "dq", "dk", "dv"), worst, strict=True))
        name = (
            f"attention {str(dtype)[6:]}" + (f", window {window}" if window else "") + (f", cap {cap}" if cap else "")
        )
        judge(f"{name}: {parts}", max(worst), TOLERANCE[dtype])
        if device.type == "cuda":
            print(f"    graphs compiled for {len(errors)} lengths: {graphs() - compiled_before}")


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def naive_head(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, head: Head) -> torch.Tensor:
    logits_NV = hidden_ND @ weight_VD.T
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)) * head.scale
    if head.softcap is not None:
        logits_NV = head.softcap * torch.tanh(logits_NV / head.softcap)
    return torch.log_softmax(logits_NV, -1).gather(-1, targets_N[:, None])[:, 0]


def check_head(device: torch.device, *, smoke: bool) -> None:
    num_tokens, width, vocab = (2100, 32, 4096) if smoke else (6000, 256, 32768)  # more than one chunk
    objective = TrainConfig(model="", data=("",), out="").objective
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(num_tokens, width, generator=generator), torch.randn(vocab, width, generator=generator)
    weight *= 6 / width**0.5
    advantages = torch.randn(num_tokens, generator=generator).to(device)
    targets = (hidden @ weight.T).argmax(-1).to(device)  # likely tokens: pi above and below tau
    targets[::3] = torch.randint(vocab, targets[::3].shape, generator=generator).to(device)

    def losses(logprobs_C: torch.Tensor, chunk: slice) -> torch.Tensor:
        return token_losses(objective, logprobs_C, advantages[chunk].to(logprobs_C.dtype), logprobs_C, logprobs_C)

    for dtype in (torch.float32, torch.bfloat16):
        for head in (Head(), Head(scale=0.5, softcap=8.0)):

            def results(width: torch.dtype, fused: bool, head: Head = head, dtype: torch.dtype = dtype) -> Any:
                h_ND, w_VD = (t.to(device).to(dtype).to(width).requires_grad_() for t in (hidden, weight))
                if fused:
                    total, _, logprobs_N, _ = fused_head(h_ND, w_VD, None, targets, losses, head)
                else:
                    logprobs_N = naive_head(h_ND, w_VD, targets, head)
                    total = losses(logprobs_N, slice(None)).sum()
                return logprobs_N, *torch.autograd.grad(total, (h_ND, w_VD))

            exact, naive, fused = results(torch.float64, False), results(dtype, False), results(dtype, True)
            for part, wanted, plain, found in zip(("log-prob", "dh", "dW"), exact, naive, fused, strict=True):
                error, allowed = relative(found, wanted), relative(plain, wanted)
                name = f"head {str(dtype)[6:]}" + (", scaled and capped" if head.softcap else "")
                judge(f"{name}: {part} (naive in this width {allowed:.1e})", error, 2 * allowed + 1e-6)
            del exact, naive, fused
            release()


def check_model(device: torch.device, *, smoke: bool) -> None:
    """Two layers: padded and naive in float32 is the reference of the rest."""
    common = {
        "vocab_size": 997,
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,
        "tie_word_embeddings": True,
    }
    rng = np.random.default_rng(0)
    examples, number = [], 0
    for prompt, lengths in ((90, (30, 200, 64, 1)), (17, (128, 60)), (300, (5, 90, 90))):
        ids = [rng.integers(0, 997, n).astype(np.int32) for n in (prompt, *lengths)]
        refs = tuple(np.zeros(n, np.float32) for n in lengths)
        these = tuple(range(number, number + len(lengths)))
        advantages = rng.normal(size=len(lengths))
        examples.append(Example(ids[0], tuple(ids[1:]), refs, advantages, np.zeros(len(lengths), np.int32), these))
        number += len(lengths)

    def run(config: Any, dtype: str, layout: Layout, *, fused: bool, compiled: bool = False) -> Any:
        policy = build(config, torch.float32, device, layout, compiled=compiled)
        batch = collate(examples, layout).to(device)
        train = TrainConfig(model="", data=("",), out="", dtype=dtype, batch={"layout": layout})
        logprobs_N = run_micro_batch(policy, train, batch, len(batch.target_ids_N), fused=fused)
        return logprobs_N, torch.cat([p.grad.flatten() for p in policy.parameters()])

    families: dict[str, Any] = {"qwen2": Qwen2Config(**common), "mistral": MistralConfig(**common, sliding_window=64)}
    for name, config in families.items():
        wanted = run(config, "float32", "padded", fused=False)
        for layout in ("packed", "shared_prefix"):
            found = run(config, "float32", layout, fused=True)
            for part, a, b in zip(("log-prob", "gradient"), found, wanted, strict=True):
                judge(f"{name}, 2 layers, float32, {layout}, fused head: {part}", relative(a, b), 1e-4)
        plain = run(config, "bfloat16", "padded", fused=False)
        for compiled in (False, True):
            found = run(config, "bfloat16", "shared_prefix", fused=True, compiled=compiled)
            for part, a, b, c in zip(("log-prob", "gradient"), found, wanted, plain, strict=True):
                allowed = relative(c, b)
                what = f"{name}, 2 layers, bf16{', compiled' if compiled else ''}: {part} (padded {allowed:.1e})"
                judge(what, relative(a, b), 2 * allowed + 1e-3)


CHECKS: tuple[Callable[..., None], ...] = (check_attention, check_head, check_model)


# ---- the program


def peak_of(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s of a GPU of this name; None where it is not known."""
    if device.type != "cuda":
        return None
    return peak_of_name(torch.cuda.get_device_name(device))


def peak_of_name(name: str) -> float | None:
    return next((rate for part, rate in PEAKS.items() if all(word in name for word in part.split())), None)


def machine(device: torch.device) -> str:
    if device.type != "cuda":
        return "no GPU"
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    rate = peak_of(device)
    counted = "its peak is not known here" if rate is None else f"peak {rate / 1e12:.0f} TFLOP/s"
    return f"{torch.cuda.get_device_name(device)}, {memory:.0f} GiB, {counted}"


def versions() -> str:
    try:
        import triton

        kernels = f"triton {triton.__version__}"
    except ImportError:
        kernels = "no triton"
    python = platform.python_version()
    return f"torch {torch.__version__}, {kernels}, transformers {transformers.__version__}, Python {python}"


def title(name: str, model: Model, *, smoke: bool) -> str:
    shape = "a tiny model in place of" if smoke else "random weights of the shape of"
    return f"{shape} Qwen2.5-{name.upper()}: {model.says}; {model.groups} groups a step, median of {model.steps} steps"


def section(options: argparse.Namespace, device: torch.device, tables: dict[str, list[Row]], minutes: float) -> str:
    """What `--write` appends."""
    command = " ".join(["python benchmarks/gpu.py", *options.given])
    checks = "checks left out" if options.skip_checks else "all checks passed"
    lines = [
        f"## {'Smoke run: no measurement' if options.smoke else machine(device)}, {date.today()}",
        "",
        f"`{command}`: {checks}; {minutes:.1f} minutes. {versions()}.",
    ]
    for name, rows in tables.items():
        model = models(smoke=options.smoke)[name]
        lines += ["", f"**{title(name, model, smoke=options.smoke)}**", "", HEADER]
        lines += [row.cells(peak_of(device)) for row in rows]
    return "\n".join(lines) + "\n"


@contextmanager
def nothing_compiled(smoke: bool) -> Iterator[None]:
    """A smoke run goes through the calls of torch.compile, and compiles nothing: that would take minutes on a CPU."""
    if smoke:
        torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        torch.compiler.set_stance("default")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training on one CUDA GPU; the top of the file says what is measured.")
    parser.add_argument("--only", choices=sorted(models(smoke=True)), help="one model")
    parser.add_argument("--micro-batch-tokens", type=int, help="instead of each model's own")
    parser.add_argument("--minutes", type=float, default=9.0, help="no row is begun later than this")
    parser.add_argument("--skip-checks", action="store_true", help="speed alone")
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU")
    parser.add_argument(
        "--write",
        nargs="?",
        type=Path,
        const=RESULTS,
        metavar="FILE",
        help="append to benchmarks/RESULTS.md, or to FILE",
    )
    options = parser.parse_args(arguments)
    options.given = list(arguments)
    if not (options.smoke or torch.cuda.is_available()):
        parser.error("torch sees no CUDA GPU here; --smoke runs on the CPU")
    return options


def main(arguments: Sequence[str]) -> None:
    began = time.monotonic()
    options = parse(arguments)
    device = torch.device("cpu") if options.smoke else torch.device("cuda", 0)
    print(f"{machine(device)}. {versions()}.\n", flush=True)
    with nothing_compiled(options.smoke):
        for check in () if options.skip_checks else CHECKS:
            check(device, smoke=options.smoke)
            release()
        tables = measure_all(options, device, began + 60 * options.minutes)
    minutes = (time.monotonic() - began) / 60
    print(f"\n{minutes:.1f} minutes", flush=True)
    if options.write is not None:
        text = options.write.read_text() if options.write.is_file() else ""
        options.write.write_text(f"{text.rstrip()}\n\n{section(options, device, tables, minutes)}".lstrip())
    for rows in tables.values():
        check_rows(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
