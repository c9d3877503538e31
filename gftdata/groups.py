"""Expert + teacher + self -> the completions of one group: their order and what is left out.

Order: expert, then teachers as the config lists them, then self; within a source as given or drawn. Identical responses
are kept, as in the paper: what a model says twice weighs twice. A given text, or a teacher's, that is longer than
`responses.max_tokens` is left out and counted, never cut: a cut response would lose its end. So is one of which nothing
is left once its thinking has been removed.
"""

import hashlib
from collections.abc import Iterable

from gftdata.config import GenerateConfig, ResponsesConfig
from gftdata.journal import Entry
from gftdata.tokens import Tokenizer, encode_response
from gftdata.types import EXPERT, SELF, Completion, FinishReason, Prompt, Response, Seed

THINK_BEGIN, THINK_END = "<think>", "</think>"


def given_origins(config: GenerateConfig) -> dict[str, tuple[str, int]]:
    """Source -> (where from, count) of the responses that come with the prompts: a column, or a reused source."""
    origins: dict[str, tuple[str, int]] = {}
    expert = EXPERT if config.prompts.reuse else config.prompts.expert_column
    if config.responses.expert.count and expert:
        origins[EXPERT] = expert, config.responses.expert.count
    for teacher in config.responses.teachers:
        if origin := teacher.column or teacher.reused:
            origins[teacher.source] = origin, teacher.count
    return origins


def given_completions(responses: ResponsesConfig, prompt: Prompt, tokenizer: Tokenizer) -> list[Completion]:
    """The prompt's own texts as completions, without those over the limit."""
    completions = (
        text_completion(responses, given.source, given.text, given.finish_reason, given.model, None, tokenizer)
        for given in prompt.given
    )
    return [completion for completion in completions if completion is not None]


def text_completion(
    responses: ResponsesConfig,
    source: str,
    text: str,
    finish_reason: FinishReason,
    model: str,
    seed: int | None,
    tokenizer: Tokenizer,
) -> Completion | None:
    """A text in the starting model's vocabulary; None where nothing is left of it, or where it is too long."""
    if responses.removes_thinking(source):
        text = without_thinking(text, cut=finish_reason == "length")
    ids = encode_response(tokenizer, text, ended=finish_reason != "length")
    if not text or not 0 < len(ids) <= responses.max_tokens:
        return None
    return Completion(source, text, ids, finish_reason, model, seed, None)


def without_thinking(text: str, *, cut: bool) -> str:
    """What follows the last `</think>`; nothing where thinking was begun and not ended.

    Some chat templates open the thinking in the prompt, so that a response has only its end, and one that was `cut`
    has neither.
    """
    if THINK_END in text:
        return text.rpartition(THINK_END)[2].lstrip()
    return "" if cut or THINK_BEGIN in text else text


def drawn_completion(responses: ResponsesConfig, entry: Entry, tokenizer: Tokenizer) -> Completion | None:
    """A journal entry as a completion in the starting model's vocabulary.

    Self samples keep their sampled ids; a teacher's text is tokenised again, and None if that is empty or too long.
    """
    if entry.source != SELF:
        return text_completion(
            responses, entry.source, entry.text, entry.finish_reason, entry.model, entry.seed, tokenizer
        )
    return Completion(
        entry.source,
        entry.text,
        entry.response_ids,
        entry.finish_reason,
        entry.model,
        entry.seed,
        entry.behavior_logprobs,
    )


def ordered(responses: ResponsesConfig, completions: Iterable[Completion | Response]) -> list[Completion | Response]:
    """The completions of a group in their canonical order."""
    order = [EXPERT, *(teacher.source for teacher in responses.teachers), SELF]
    return sorted(completions, key=lambda found: order.index(completion_of(found).source))


def completion_of(found: Completion | Response) -> Completion:
    """The completion, also of one that has been judged and scored."""
    return found.completion if isinstance(found, Response) else found


def sample_seed(run_seed: int, prompt_id: str, source: str, index: int) -> Seed:
    """The seed of one sample: 63 bits of sha256 over what identifies it, so that it is the same in every run."""
    digest = hashlib.sha256(f"{run_seed}\n{prompt_id}\n{source}\n{index}".encode()).digest()
    return Seed(int.from_bytes(digest[:8], "big") >> 1)
