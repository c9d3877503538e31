"""The embedded engine: transformers in this process, on CPU or GPU. A Sampler and a Scorer.

Shapes: B rows (responses), U distinct prompts, P prompt tokens, T response tokens, V vocabulary.

The prompt is computed once for all responses of a group: its keys and values, all but the last token's, are cached and
repeated; what then goes in is the prompt's last token followed by the response, so that row t of the logits speaks of
response token t.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from gftdata.config import HfConfig
from gftdata.errors import UserError, first_line
from gftdata.tokens import Tokenizer, decode_response, next_token_inputs
from gftdata.types import FinishReason, LogProbs, Sample, SampleRequest, Sampling, ScoreRequest, TokenIds

MAX_LOGITS = 2**28  # elements of one batch of logits: 1 GiB in float32
SORT_WINDOW = 16  # batches whose requests are sorted by length together


def pick_device(name: str) -> torch.device:
    """`auto` is the first accelerator that torch has, else the CPU. Raises UserError for one that is not there."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device `{name}` cannot be used: {first_line(error)}") from None
    return device


def load_model(model: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A transformers causal language model in evaluation mode. Raises UserError where it cannot be loaded."""
    try:
        # said, not left to defaults: transformers would ask on a terminal, and load a pickle where that is all there is
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # what a library makes of damaged or hostile files: anything
        raise UserError(f"{model}: cannot load this model: {first_line(error)[:300]}") from None
    return loaded.to(device).eval()


def token_logprobs(logits_BTV: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
    """log softmax(logits)[ids] -> [B, T], in nats, computed in float32 at least."""
    wide = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
    # not log_softmax, whose kernel on a CPU adds up one after the other: up to 6 times the rounding error
    return wide.gather(-1, ids_BT.unsqueeze(-1)).squeeze(-1) - wide.logsumexp(-1)


class HfEngine:
    """A loaded model that samples and scores."""

    concurrent = False  # one forward pass at a time
    version = f"hf {transformers.__version__}"

    def __init__(self, model: Any, tokenizer: Tokenizer, *, batch_size: int, batch_tokens: int) -> None:
        # a model's own generation settings (penalties, bad words) would make samples of another policy than pi
        model.generation_config = GenerationConfig()
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens
        self.max_logit_rows = MAX_LOGITS // model.config.get_text_config().vocab_size
        self.max_positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def close(self) -> None:
        """Give the model's memory back."""
        self.model = None
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    @torch.inference_mode()
    def sample(self, requests: Iterable[SampleRequest], sampling: Sampling) -> Iterator[Sample]:
        """Draw one response for each request. See `Sampler`.

        A sample depends on its own seed and prompt alone, not on its batch, up to floating-point ties.
        """
        stream = iter(requests)
        while window := list(islice(stream, self.batch_size * SORT_WINDOW)):
            window.sort(key=lambda request: len(request.prompt_ids))  # stable: a group stays together
            for start in range(0, len(window), self.batch_size):
                yield from self._sample_batch(window[start : start + self.batch_size], sampling)

    @torch.inference_mode()
    def score(self, requests: Sequence[ScoreRequest]) -> list[LogProbs]:
        """log pi of given response tokens at temperature 1. See `Scorer`."""
        order = sorted(
            range(len(requests)), key=lambda i: (len(requests[i].prompt_ids), requests[i].prompt_ids.tobytes())
        )
        scores: list[LogProbs] = [np.empty(0, np.float32)] * len(requests)
        batch: list[int] = []
        longest = 0  # of the batch's responses; its prompts come shortest first, so the newest is the longest
        for i in order:
            num_prompt, num_response = len(requests[i].prompt_ids), len(requests[i].response_ids)
            wider, rows = max(longest, num_response), len(batch) + 1
            if batch and (rows * wider > self.max_logit_rows or rows * (num_prompt + wider) > self.batch_tokens):
                self._score_batch([(j, requests[j]) for j in batch], scores)
                batch, wider = [], num_response
            batch.append(i)
            longest = wider
        if batch:
            self._score_batch([(j, requests[j]) for j in batch], scores)
        return scores

    def _score_batch(self, batch: Sequence[tuple[int, ScoreRequest]], scores: list[LogProbs]) -> None:
        requests = [request for _, request in batch]
        self._check_length(max(len(r.prompt_ids) + len(r.response_ids) for r in requests))
        self._check_ids(requests)
        prompts = _Prompts.of([r.prompt_ids for r in requests])
        cache = self._prefill(prompts)
        lengths = [len(r.response_ids) for r in requests]
        targets_BT = _pad([r.response_ids for r in requests], left=False)
        shifted = [next_token_inputs(r.prompt_ids, r.response_ids) for r in requests]
        inputs_BT = _pad([inputs[first:] for inputs, first in shifted], left=False)
        mask_BT = torch.arange(inputs_BT.shape[1])[None, :] < torch.tensor(lengths)[:, None]
        positions_BT = torch.tensor(prompts.lengths_B)[:, None] - 1 + torch.arange(inputs_BT.shape[1])[None, :]
        logits_BTV = self.model(
            input_ids=self._put(inputs_BT),
            attention_mask=self._put(torch.cat([prompts.mask_BP[:, :-1], mask_BT.long()], dim=1)),
            position_ids=self._put(positions_BT),
            past_key_values=cache,
            use_cache=True,
        ).logits
        logprobs_BT = token_logprobs(logits_BTV, self._put(targets_BT)).float().cpu().numpy()
        for (i, _), row_T, length in zip(batch, logprobs_BT, lengths, strict=True):
            if not np.isfinite(row_T[:length]).all():
                raise UserError("the model gave a log-prob that is not finite; try engine.dtype=float32")
            scores[i] = row_T[:length].copy()

    def _sample_batch(self, requests: Sequence[SampleRequest], sampling: Sampling) -> Iterator[Sample]:
        prompts = _Prompts.of([r.prompt_ids for r in requests])
        self._check_length(max(prompts.lengths_B) + sampling.max_tokens)
        num_prompt_tokens = prompts.ids_BP.shape[1]
        draw = _InverseCdf([int(r.seed) for r in requests], sampling, self.model.device)
        stop = [_StopTexts(self.tokenizer, sampling.stop, num_prompt_tokens)] if sampling.stop else []
        output_BL = self.model.generate(
            input_ids=self._put(prompts.ids_BP),
            attention_mask=self._put(prompts.mask_BP),
            past_key_values=self._prefill(prompts),
            do_sample=False,  # `draw` leaves one candidate; temperature and top-p are its own
            max_new_tokens=sampling.max_tokens,
            eos_token_id=list(self.tokenizer.stop_ids),
            pad_token_id=self.tokenizer.end_id,
            logits_processor=LogitsProcessorList([draw]),
            stopping_criteria=StoppingCriteriaList(stop),
        )
        new_BT = output_BL[:, num_prompt_tokens:].cpu().numpy().astype(np.int32)
        logprobs_BT = torch.stack(draw.logprobs, dim=1).float().cpu().numpy()
        for request, ids_T, logprobs_T in zip(requests, new_BT, logprobs_BT, strict=True):
            length, reason = self._end_of(ids_T, sampling)
            ids = ids_T[:length].copy()
            text = decode_response(self.tokenizer, ids)
            yield Sample(request, text, ids, logprobs_T[:length].copy(), length, reason, int(request.seed))

    def _end_of(self, ids_T: TokenIds, sampling: Sampling) -> tuple[int, FinishReason]:
        """Where a row ended by itself: at its first end token or stop text. What follows is padding."""
        ends = np.flatnonzero(np.isin(ids_T, self.tokenizer.stop_ids))
        length = int(ends[0]) + 1 if len(ends) else len(ids_T)
        reason: FinishReason = "stop" if len(ends) else "length"
        if sampling.stop and _holds(self.tokenizer, ids_T[:length], sampling.stop):
            low, high = 1, length
            while low < high:
                middle = (low + high) // 2
                held = _holds(self.tokenizer, ids_T[:middle], sampling.stop)
                low, high = (low, middle) if held else (middle + 1, high)
            return low, "stop"
        return length, reason

    def _prefill(self, prompts: "_Prompts") -> Any:
        """Keys and values of all prompt tokens but the last, computed once a prompt, repeated for its rows."""
        if prompts.ids_BP.shape[1] == 1:
            return None
        unique = prompts.first_rows_U
        mask_UP = prompts.mask_BP[unique][:, :-1]
        cache = self.model(
            input_ids=self._put(prompts.ids_BP[unique][:, :-1]),
            attention_mask=self._put(mask_UP),
            position_ids=self._put((mask_UP.cumsum(-1) - 1).clamp(min=0)),
            use_cache=True,
            logits_to_keep=1,
        ).past_key_values
        if not hasattr(cache, "batch_select_indices"):
            raise UserError(
                f"engine hf: {type(self.model).__name__} keeps a {type(cache).__name__}, which cannot be repeated over "
                "the responses of a group; attention-only decoder models work"
            )
        cache.batch_select_indices(self._put(torch.tensor(prompts.unique_of_B)))
        return cache

    def _put(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.model.device)

    def _check_ids(self, requests: Sequence[ScoreRequest]) -> None:
        """Raise UserError for ids that the model has not: an accelerator would end the process over one."""
        size = self.model.config.get_text_config().vocab_size
        for request in requests:
            ids = np.concatenate([request.prompt_ids, request.response_ids])
            if len(ids) and (ids.min() < 0 or ids.max() >= size):
                raise UserError(f"token ids from {ids.min()} to {ids.max()}, the model has ids from 0 to {size - 1}")

    def _check_length(self, tokens: int) -> None:
        if self.max_positions is not None and tokens > self.max_positions:
            raise UserError(
                f"prompt and response take {tokens} tokens and the model holds {self.max_positions}; "
                "lower the maximum number of response tokens (max_tokens) or prompts.max_prompt_tokens"
            )


def open_engine(model: str, config: HfConfig, tokenizer: Tokenizer) -> HfEngine:
    """Load a model as the config says."""
    device = pick_device(config.device)
    auto = torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = auto if config.dtype == "auto" else getattr(torch, config.dtype)
    return HfEngine(
        load_model(model, dtype, device), tokenizer, batch_size=config.batch_size, batch_tokens=config.batch_tokens
    )


@dataclass(frozen=True, slots=True)
class _Prompts:
    """The prompts of a batch, left-padded, and which rows share one."""

    ids_BP: torch.Tensor
    mask_BP: torch.Tensor
    lengths_B: list[int]
    first_rows_U: list[int]  # a row of each distinct prompt
    unique_of_B: list[int]  # row -> index of its distinct prompt

    @classmethod
    def of(cls, prompt_ids: Sequence[TokenIds]) -> "_Prompts":
        first_rows: list[int] = []
        unique: list[int] = []
        for _, rows in groupby(range(len(prompt_ids)), key=lambda row: prompt_ids[row].tobytes()):
            members = list(rows)
            unique += [len(first_rows)] * len(members)
            first_rows.append(members[0])
        lengths = [len(ids) for ids in prompt_ids]
        ids_BP = _pad(prompt_ids, left=True)
        mask_BP = torch.arange(ids_BP.shape[1])[None, :] >= ids_BP.shape[1] - torch.tensor(lengths)[:, None]
        return cls(ids_BP, mask_BP.long(), lengths, first_rows, unique)


def _pad(rows: Sequence[TokenIds], *, left: bool) -> torch.Tensor:
    width = max(len(ids) for ids in rows)
    padded = np.zeros((len(rows), width), dtype=np.int64)
    for row, ids in enumerate(rows):
        padded[row, width - len(ids) :] = ids if left else 0
        if not left:
            padded[row, : len(ids)] = ids
    return torch.from_numpy(padded)


def _holds(tokenizer: Tokenizer, ids_T: TokenIds, stop: Sequence[str]) -> bool:
    text = decode_response(tokenizer, ids_T)
    return any(part in text for part in stop)


class _StopTexts(StoppingCriteria):  # type: ignore[misc]
    """Ends a row whose response holds a stop text.

    Not transformers' own stop_strings: those also match a text that begins in the prompt, and do not work with every
    tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], num_prompt_tokens: int) -> None:
        self.tokenizer, self.stop, self.num_prompt_tokens = tokenizer, stop, num_prompt_tokens
        self.tail = 4 * max(len(part) for part in stop) + 8  # a character has up to 4 bytes, a token each at worst

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        done_B = [
            # first the last tokens alone: cheap, and nearly always the answer
            _holds(self.tokenizer, ids_T[-self.tail :], self.stop) and _holds(self.tokenizer, ids_T, self.stop)
            for ids_T in input_ids[:, self.num_prompt_tokens :].cpu().numpy()
        ]
        return torch.tensor(done_B, device=input_ids.device)


class _InverseCdf(LogitsProcessor):  # type: ignore[misc]
    """Draws the next token of every row by inverse transform sampling and leaves it as the only candidate.

    Row b uses its own stream of uniform numbers, one a token, so that what the other rows do cannot change it.
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling, device: torch.device) -> None:
        self.sampling = sampling
        self.logprobs: list[torch.Tensor] = []  # one [B] a step: temperature-scaled, before top-p
        # float64 does not exist on Apple's GPUs
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        uniforms = [torch.rand(sampling.max_tokens, dtype=torch.float64, generator=_generator(seed)) for seed in seeds]
        self.uniforms_BT = torch.stack(uniforms).to(device, self.dtype)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logprobs_BV = torch.log_softmax(scores.float() / self.sampling.temperature, dim=-1)
        probs_BV = logprobs_BV.exp().to(self.dtype)
        if torch.isnan(probs_BV).any():
            raise UserError("the model gave logits that are not numbers; try engine.dtype=float32")
        uniform_B1 = self.uniforms_BT[:, len(self.logprobs), None]
        if self.sampling.top_p < 1.0:
            sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
            before_BV = sorted_BV.cumsum(-1) - sorted_BV
            kept_BV = torch.where(before_BV < self.sampling.top_p, sorted_BV, 0.0)
            chosen_B1 = order_BV.gather(-1, _invert(kept_BV, uniform_B1))
        else:
            chosen_B1 = _invert(probs_BV, uniform_B1)
        self.logprobs.append(logprobs_BV.gather(-1, chosen_B1).squeeze(-1))
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen_B1, 0.0)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _invert(probs_BV: torch.Tensor, uniform_B1: torch.Tensor) -> torch.Tensor:
    """The first index whose cumulative probability exceeds the uniform number -> [B, 1]."""
    cumulative_BV = probs_BV.cumsum(-1)
    chosen_B1 = torch.searchsorted(cumulative_BV, uniform_B1 * cumulative_BV[:, -1:], right=True)
    last_positive_B1 = probs_BV.shape[-1] - 1 - (probs_BV.flip(-1) > 0).int().argmax(-1, keepdim=True)
    return torch.minimum(chosen_B1, last_positive_B1)
