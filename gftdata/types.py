"""What flows through `gft generate`: frozen, and a later stage is a new type rather than a filled-in field.

Prompt --engine--> Completion --reward, scorer--> Response --> Group
"""

from dataclasses import dataclass, replace
from typing import Literal, NewType

import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.int32]
LogProbs = npt.NDArray[np.float32]

EXPERT = "expert"
SELF = "self"
TEACHER_PREFIX = "teacher:"

GREEDY_TOP_P = 1e-9  # so small that the likeliest token alone is left: greedy decoding is one more way to sample

FinishReason = Literal["stop", "length", "given"]
Seed = NewType("Seed", int)


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class GivenText:
    """A response that came with the prompt's data: an expert demonstration or a stored teacher response."""

    source: str  # `expert` or `teacher:<name>`
    text: str
    finish_reason: FinishReason = "given"  # of a reused response: what it was there
    model: str = "data"  # of a reused response: who wrote it


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question in chat form with everything its source said about it."""

    prompt_id: str
    source_id: str | None
    messages: tuple[Message, ...]
    ground_truth: str | None
    data_source: str
    given: tuple[GivenText, ...]
    extra: str  # JSON object: what the source carried along
    question: str  # the last message before `prompts.template`: what a teacher's own template is filled with


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a response is drawn. Log-probs stored as reference are always taken at temperature 1."""

    temperature: float
    top_p: float
    max_tokens: int
    stop: tuple[str, ...]

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token alone can be drawn."""
        return self.top_p <= GREEDY_TOP_P

    def greedily(self) -> "Sampling":
        """The same limits, and always the likeliest token."""
        return replace(self, temperature=1.0, top_p=GREEDY_TOP_P)


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One sample to draw: the k-th response of one source to one prompt."""

    prompt_id: str
    index: int  # k: 0 .. count-1 within its source
    messages: tuple[Message, ...]
    prompt_ids: TokenIds  # [P], in the sampling model's own vocabulary; empty for an endpoint that takes text
    seed: Seed


@dataclass(frozen=True, slots=True)
class Sample:
    """A drawn response, as ids of the sampling model's vocabulary; an endpoint that gives text leaves them empty."""

    request: SampleRequest
    text: str
    response_ids: TokenIds  # [T], end token included when it ended by itself
    behavior_logprobs: LogProbs  # [T], nats, temperature-scaled, before top-p
    num_tokens: int  # T, as the sampling model counts; 0 where an endpoint does not say
    finish_reason: FinishReason
    seed: int | None  # None where the engine does not honour seeds


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request that the engine gave up, and why."""

    request: SampleRequest
    reason: str


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Tokens whose log-probs are wanted."""

    prompt_ids: TokenIds  # [P]
    response_ids: TokenIds  # [T]


@dataclass(frozen=True, slots=True)
class Unscored:
    """Stands for log-probs that the engine gave up, and says why."""

    reason: str


@dataclass(frozen=True, slots=True)
class Completion:
    """A response in the starting model's vocabulary, not yet judged or scored."""

    source: str
    text: str
    response_ids: TokenIds  # [T]
    finish_reason: FinishReason
    model: str  # name@revision, or `data` for given text
    seed: int | None
    behavior_logprobs: LogProbs | None  # [T], self samples only


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a reward function says of one response; `reward` is None exactly when it could not be judged."""

    reward: float | None
    status: str  # ok | timeout | error:<kind> | no_ground_truth

    def __post_init__(self) -> None:
        if (self.reward is None) == (self.status == "ok"):
            raise ValueError(f"a verdict has a reward exactly when its status is ok, found {self}")


@dataclass(frozen=True, slots=True)
class Response:
    """A completion with its verdict and its log-probs under the starting model."""

    completion: Completion
    verdict: Verdict
    ref_logprobs: LogProbs  # [T], nats, temperature 1, full vocabulary


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt with all its responses: one row of a shard."""

    prompt: Prompt
    prompt_ids: TokenIds  # [P], generation prompt included
    responses: tuple[Response, ...]
