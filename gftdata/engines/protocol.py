"""What the pipeline asks of an engine. A Sampler draws responses, a Scorer gives log-probs of given tokens.

Two Protocols, because an endpoint that returns only text can be a teacher and never the reference.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from gftdata.types import LogProbs, Refusal, Sample, SampleRequest, Sampling, ScoreRequest, Unscored


class Sampler(Protocol):
    """Draws responses."""

    def sample(self, requests: Iterable[SampleRequest], sampling: Sampling) -> Iterator[Sample | Refusal]:
        """Yield one sample for each request, or its refusal where the engine gave it up, in order of completion.

        Requests of one prompt come one after the other. They are taken from the iterable as there is room for them.
        """
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


class Scorer(Protocol):
    """Gives log-probs of tokens that are already there."""

    def score(self, requests: Sequence[ScoreRequest]) -> Sequence[LogProbs | Unscored]:
        """log pi of each request's response tokens [T], in order: nats, temperature 1, full vocabulary."""
        ...


class Engine(Sampler, Scorer, Protocol):
    """A running model that does both."""

    @property
    def concurrent(self) -> bool:
        """Whether `score` may be called by another thread while `sample` goes on."""
        ...

    @property
    def version(self) -> str:
        """Name and version, as the manifest records them."""
        ...
