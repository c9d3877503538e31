"""`gft eval`: pass@1 averaged over samples, pass@k, greedy, entropy and KL to a reference, on any prompt file."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from gftdata.engines.hf import HfEngine, open_engine
from gftdata.errors import UserError
from gftdata.groups import sample_seed
from gftdata.judging import Submit, open_judges
from gftdata.prompts import read_prompts
from gftdata.rewards import NEEDS_GROUND_TRUTH, resolve
from gftdata.shards import check_writable, write_atomic
from gftdata.tokens import Tokenizer, encode_prompt, load_tokenizer
from gftdata.types import Prompt, Sample, SampleRequest, Sampling, ScoreRequest, Verdict
from gfttrain.config import EvalConfig
from gfttrain.runs import finished_model

# Top-p this small keeps the likeliest token alone, so greedy decoding is one more way to sample.
GREEDY_TOP_P = 1e-9
EXAMPLES = 32


@dataclass(frozen=True, slots=True)
class Answer:
    """One prompt's greedy answer, for people to read."""

    question: str
    text: str
    reward: float | None


@dataclass(frozen=True, slots=True)
class EvalResult:
    """What `gft eval` measures. Averages are over prompts with at least one judged sample."""

    model: str
    prompts: int
    prompts_too_long: int
    samples_per_prompt: int
    unjudged_samples: int
    truncated_samples: int
    mean_tokens: float
    mean_reward: float
    pass_at: dict[int, float]  # k -> unbiased estimate over prompts with k judged samples; no entry where none has
    pass_at_1_stderr: float | None  # standard error over prompts, of at least two
    greedy: float | None
    entropy: float | None  # nats per token, estimated as the mean of -log pi over samples of pi itself
    kl: float | None  # KL(model || reference), nats per token, likewise
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, for whoever shows progress."""

    kind: Literal["start", "sample"]
    count: int = 0  # start: samples to draw
    tokens: int = 0


Listener = Callable[[Event], None]


def pass_at_k(num_samples: npt.ArrayLike, num_correct: npt.ArrayLike, k: int) -> npt.NDArray[np.float64]:
    """1 - C(n-c, k) / C(n, k) of each prompt: the chance that k of its n samples, c of them right, hold a right one.

    The unbiased estimator of Chen et al., arXiv:2107.03374, eq. 1, as a product so that nothing overflows. NaN where a
    prompt has fewer than k samples.
    """
    n, c = np.broadcast_arrays(np.asarray(num_samples, np.float64), np.asarray(num_correct, np.float64))
    failing = np.ones(n.shape)
    for i in range(k):
        failing *= np.clip((n - c - i) / np.maximum(n - i, 1.0), 0.0, None)
    return np.where(n >= k, 1.0 - failing, np.nan)


def evaluate(config: EvalConfig, on_event: Listener = lambda event: None) -> EvalResult:
    """Sample, judge, count. Raises UserError for what the user can mend."""
    config = config.model_copy(update={"model": finished_model(config.model)})
    tokenizer = load_tokenizer(config.model)
    if config.reference and load_tokenizer(config.reference).hash != tokenizer.hash:
        raise UserError(f"reference {config.reference}: has another tokenizer than {config.model}")
    if config.out:
        check_result_file(Path(config.out))
    prompts, too_long = eval_prompts(config, tokenizer)
    return evaluate_engine(config, open_engine(config.model, config.engine, tokenizer), prompts, too_long, on_event)


def evaluate_engine(
    config: EvalConfig,
    engine: HfEngine,
    prompts: Sequence[Prompt],
    too_long: int,
    on_event: Listener = lambda event: None,
) -> EvalResult:
    """`evaluate` with a model that is loaded already, on prompts of `eval_prompts`."""
    count = len(prompts) * (config.num_samples + config.greedy)
    on_event(Event("start", count=count))
    sampling = config.sampling.with_limit(config.max_tokens)
    greedy_sampling = Sampling(1.0, GREEDY_TOP_P, config.max_tokens, sampling.stop)
    with open_judges(config.reward) as submit:
        samples, verdicts = _sample(config, engine, prompts, sampling, config.num_samples, submit, on_event)
        best, best_verdicts = _sample(config, engine, prompts, greedy_sampling, int(config.greedy), submit, on_event)
    rewards_PN = np.array([[np.nan if v.reward is None else v.reward for v in row] for row in verdicts])
    greedy: float | None = None
    answers: tuple[Answer, ...] = ()
    if config.greedy:
        judged = [v.reward == 1.0 for (v,) in best_verdicts if v.reward is not None]
        greedy = float(np.mean(judged)) if judged else None
        shown = zip(prompts, best, best_verdicts, strict=True)
        answers = tuple(
            Answer(prompt.messages[-1].content, sample.text, verdict.reward)
            for prompt, (sample,), (verdict,) in list(shown)[:EXAMPLES]
        )
    drawn = [sample for row in samples for sample in row]
    judged_P = np.isfinite(rewards_PN).sum(1)
    if not judged_P.any():
        raise UserError(f"none of {len(drawn)} samples could be judged ({verdicts[0][0].status}); look at reward.name")
    correct_P = (rewards_PN == 1.0).sum(1)
    once_P = pass_at_k(judged_P, correct_P, 1)
    num_once = int(np.isfinite(once_P).sum())
    num_tokens = sum(len(sample.response_ids) for sample in drawn)
    own = config.samples_the_model_itself
    return EvalResult(
        model=config.model,
        prompts=len(prompts),
        prompts_too_long=too_long,
        samples_per_prompt=config.num_samples,
        unjudged_samples=int(np.isnan(rewards_PN).sum()),
        truncated_samples=sum(sample.finish_reason == "length" for sample in drawn),
        mean_tokens=num_tokens / len(drawn),
        mean_reward=float(np.nanmean(rewards_PN)),
        pass_at={
            k: float(np.nanmean(pass_at_k(judged_P, correct_P, k)))
            for k in sorted({1, *config.k})
            if k <= judged_P.max()
        },
        pass_at_1_stderr=float(np.nanstd(once_P, ddof=1) / math.sqrt(num_once)) if num_once > 1 else None,
        greedy=greedy,
        entropy=-sum(float(s.behavior_logprobs.sum(dtype=np.float64)) for s in drawn) / num_tokens if own else None,
        kl=_kl(config, engine.tokenizer, drawn, num_tokens) if config.reference else None,
        answers=answers,
    )


def eval_prompts(config: EvalConfig, tokenizer: Tokenizer) -> tuple[list[Prompt], int]:
    """The prompts to evaluate on, and how many were too long."""
    resolve(config.reward.name)
    needs_truth = config.reward.name in NEEDS_GROUND_TRUTH
    read = list(read_prompts(config.prompts, {}, needs_ground_truth=needs_truth))
    limit = config.prompts.max_prompt_tokens
    kept = [prompt for prompt in read if len(encode_prompt(tokenizer, prompt.messages)) <= limit]
    if len(kept) < len(read) and (config.prompts.on_too_long == "error" or not kept):
        raise UserError(
            f"{len(read) - len(kept)} of {len(read)} prompts are longer than prompts.max_prompt_tokens={limit}"
        )
    return kept, len(read) - len(kept)


def _sample(
    config: EvalConfig,
    engine: HfEngine,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    count: int,
    submit: Submit,
    on_event: Listener,
) -> tuple[list[list[Sample]], list[list[Verdict]]]:
    """`count` samples of each prompt with their verdicts, in the prompts' order."""
    place = {prompt.prompt_id: row for row, prompt in enumerate(prompts)}
    requests = (
        SampleRequest(p.prompt_id, k, p.messages, ids, sample_seed(config.seed, p.prompt_id, "eval", k))
        for p in prompts
        for ids in [encode_prompt(engine.tokenizer, p.messages)]
        for k in range(count)
    )
    found = []
    for sample in engine.sample(requests, sampling):
        row = place[sample.request.prompt_id]
        found.append((row, sample.request.index, sample, submit(prompts[row], sample.text)))
        on_event(Event("sample", tokens=len(sample.response_ids)))
    found.sort(key=lambda item: item[:2])
    verdicts = [future.result() for *_, future in found]
    samples = [sample for _, _, sample, _ in found]
    rows = range(0, len(found), max(1, count))
    return [samples[i : i + count] for i in rows], [verdicts[i : i + count] for i in rows]


def _kl(config: EvalConfig, tokenizer: Tokenizer, drawn: Sequence[Sample], num_tokens: int) -> float:
    """Mean of log pi - log pi_ref over the tokens of samples of pi: an unbiased estimate of the KL per token."""
    assert config.reference is not None
    reference = open_engine(config.reference, config.engine, tokenizer)
    scores = reference.score([ScoreRequest(s.request.prompt_ids, s.response_ids) for s in drawn])
    total = sum(
        float((sample.behavior_logprobs.astype(np.float64) - score).sum())
        for sample, score in zip(drawn, scores, strict=True)
    )
    return total / num_tokens


def check_result_file(path: Path) -> None:
    """Raise UserError unless a result may be written there: over nothing, or over an earlier result."""
    check_writable(path.parent)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file for the result (out)")
    if path.exists():
        try:
            earlier = json.loads(path.read_bytes()).keys() >= {"result", "config"}
        except (ValueError, AttributeError, OSError):
            earlier = False
        if not earlier:
            raise UserError(f"{path}: exists and is not a result of gft eval; name another file (out)")


def write_result(path: Path, config: EvalConfig, result: EvalResult) -> None:
    """The result with the settings that made it, as JSON."""
    data = {"result": asdict(result), "config": config.model_dump(mode="json")}
    write_atomic(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
