"""What SGLang is asked and how its answers are read: the same for the offline engine and for a server.

An answer is what `reduced` in sglang_worker.py leaves of a result: how it ended, ids, [log-probs, ids]. Whether a bad
answer is asked for again is the engines' own affair.
"""

import zlib
from typing import Any

import numpy as np

from gftdata.tokens import Tokenizer, decode_response
from gftdata.types import (
    FinishReason,
    LogProbs,
    Sample,
    SampleRequest,
    Sampling,
    ScoreRequest,
    TokenIds,
)


class BadAnswerError(Exception):
    """An answer that speaks of other tokens than it should, or holds what is no log-prob."""


def sampling_arguments(
    tokenizer: Tokenizer, sampling: Sampling, request: SampleRequest, *, honours_seeds: bool
) -> dict[str, Any]:
    """The arguments of `generate` for one sample; a seed goes along only where the engine honours it."""
    parameters = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_new_tokens": sampling.max_tokens,
        "stop_token_ids": list(tokenizer.stop_ids),
        "stop": list(sampling.stop) or None,
        "no_stop_trim": True,
        "skip_special_tokens": True,
    }
    if sampling.greedy:
        parameters["top_k"] = 1  # its kernels differ in what so small a top_p leaves
    seed = {"sampling_seed": int(request.seed)} if honours_seeds else {}
    return {
        "input_ids": request.prompt_ids.tolist(),
        "sampling_params": parameters | seed,
        "return_logprob": True,
    }


def scoring_arguments(request: ScoreRequest) -> dict[str, Any]:
    """The arguments of `generate` for the log-probs of given tokens: a prefill of prompt + response."""
    return {
        "input_ids": [*request.prompt_ids.tolist(), *request.response_ids.tolist()],
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": len(request.prompt_ids) - 1,
    }


def prompt_number(prompt_ids: TokenIds) -> int:
    """A group's prompt is computed once only if all its requests go to the same replica: this number says which."""
    return zlib.crc32(prompt_ids.tobytes())


def failure_of(answer: dict[str, Any]) -> str | None:
    """Why an answer is none. SGLang reports a NaN as an ordinary stop."""
    reason = answer["finish_reason"]
    if reason["type"] == "abort":
        return f"aborted: {reason.get('message', 'no reason given')}"
    if reason.get("matched") == "NaN happened":
        return "the model gave a NaN"
    return None


def to_sample(tokenizer: Tokenizer, request: SampleRequest, answer: dict[str, Any], *, honours_seeds: bool) -> Sample:
    """Raises BadAnswerError where the log-probs are not those of the sampled ids, or not finite."""
    ids = np.asarray(answer["output_ids"], dtype=np.int32)
    found, tokens = answer["output_token_logprobs"]
    if not np.array_equal(tokens, ids):
        raise BadAnswerError(f"log-probs of other tokens than the sampled ones: {len(tokens)} of {len(ids)}")
    reason: FinishReason = "length" if answer["finish_reason"]["type"] == "length" else "stop"
    logprobs = np.asarray(found, dtype=np.float32)
    if not np.isfinite(logprobs).all():
        raise BadAnswerError("a log-prob is not finite")
    seed = int(request.seed) if honours_seeds else None
    return Sample(request, decode_response(tokenizer, ids), ids, logprobs, len(ids), reason, seed)


def scored(tokenizer: Tokenizer, request: ScoreRequest, answer: dict[str, Any]) -> LogProbs:
    """The log-probs of a scoring answer: one None, then exactly the response's tokens, or BadAnswerError.

    SGLang 0.5.23 reports the last id of the vocabulary as 0, where it clips what stands for images; its log-prob is
    that of the id itself.
    """
    found, tokens = answer["input_token_logprobs"]
    reported = np.where(request.response_ids < len(tokenizer.backend) - 1, request.response_ids, 0)
    logprobs = np.asarray(found, dtype=np.float32)  # None becomes NaN
    if (
        len(logprobs) == 0
        or not np.isnan(logprobs[0])
        or not (np.array_equal(tokens[1:], request.response_ids) or np.array_equal(tokens[1:], reported))
    ):
        first = "none" if len(logprobs) == 0 else f"{logprobs[0]:.3f}"
        raise BadAnswerError(
            f"scored other tokens than the given ones: {len(tokens)} of {len(request.response_ids) + 1}, first {first}"
        )
    scores = logprobs[1:]
    if not np.isfinite(scores).all():
        raise BadAnswerError("a log-prob is not finite")
    return scores
