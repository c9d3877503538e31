"""Expert + teacher + self -> the completions of one group: their order and what is left out.

Order: expert, then teachers as the config lists them, then self; within a source as given or drawn. Identical responses
are kept, as in the paper: what a model says twice weighs twice. A given text, or a teacher's, that is longer than
`responses.max_tokens` is left out and counted, never cut: a cut response would lose its end.
"""

from collections.abc import Iterable

from gftdata.config import GenerateConfig, ResponsesConfig
from gftdata.journal import Entry
from gftdata.tokens import Tokenizer, encode_response
from gftdata.types import EXPERT, SELF, Completion, Prompt


def given_columns(config: GenerateConfig) -> dict[str, tuple[str, int]]:
    """Source -> (column, count) of the responses that come with the prompts."""
    columns: dict[str, tuple[str, int]] = {}
    if config.responses.expert.count and config.prompts.columns.expert:
        columns[EXPERT] = config.prompts.columns.expert, config.responses.expert.count
    for teacher in config.responses.teachers:
        if teacher.column:
            columns[teacher.source] = teacher.column, teacher.count
    return columns


def given_completions(responses: ResponsesConfig, prompt: Prompt, tokenizer: Tokenizer) -> list[Completion]:
    """The prompt's own texts as completions, without those over the limit."""
    completions = (
        Completion(
            text.source, text.text, encode_response(tokenizer, text.text, ended=True), "given", "data", None, None
        )
        for text in prompt.given
    )
    return [c for c in completions if len(c.response_ids) <= responses.max_tokens]


def drawn_completion(responses: ResponsesConfig, entry: Entry, tokenizer: Tokenizer) -> Completion | None:
    """A journal entry as a completion in the starting model's vocabulary.

    Self samples keep their sampled ids; a teacher's text is tokenised again, and None if that is empty or too long.
    """
    if entry.source == SELF:
        ids, behavior = entry.response_ids, entry.behavior_logprobs
    else:
        ids, behavior = encode_response(tokenizer, entry.text, ended=entry.finish_reason == "stop"), None
        if not 0 < len(ids) <= responses.max_tokens:
            return None
    return Completion(entry.source, entry.text, ids, entry.finish_reason, entry.model, entry.seed, behavior)


def ordered(responses: ResponsesConfig, completions: Iterable[Completion]) -> list[Completion]:
    """The completions of a group in their canonical order."""
    order = [EXPERT, *(teacher.source for teacher in responses.teachers), SELF]
    return sorted(completions, key=lambda completion: order.index(completion.source))
