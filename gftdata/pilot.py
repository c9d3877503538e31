"""A few prompts for real, to know before paying: rate, pass rates, groups with signal, tokens, bytes, hours."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from gftdata.config import GenerateConfig
from gftdata.errors import UserError
from gftdata.events import Event, Listener
from gftdata.generate import generate
from gftdata.manifest import Summary
from gftdata.prepare import Preview


@dataclass(frozen=True, slots=True)
class Pilot:
    """What the pilot measured, and what it makes one expect of all prompts."""

    summary: Summary
    seconds: float  # at work; starting engines is not counted
    share_with_signal: float  # groups whose rewards are not all equal
    expected_response_tokens: int
    expected_bytes: int
    expected_seconds: float


def run_pilot(
    config: GenerateConfig, preview: Preview, num_prompts: int, on_event: Listener = lambda event: None
) -> Pilot:
    """Generate the groups of the first `num_prompts` prompts in a temporary folder and scale up to `preview`'s.

    The rate is that of so few prompts: an engine that holds more requests than these at a time will be faster.
    """
    if config.extend is not None:
        raise UserError("a pilot measures a recipe from nothing: leave `extend` out for it (--set extend=null)")
    spans: list[tuple[float, float]] = []  # of each phase: when its engine was up, when the last thing happened

    def listen(event: Event) -> None:
        now = time.perf_counter()
        if event.kind == "phase":
            spans.append((now, now))
        elif spans:
            spans[-1] = (spans[-1][0], now)
        on_event(event)

    with tempfile.TemporaryDirectory(prefix="gft-pilot-") as folder:
        prompts = config.prompts.model_copy(update={"limit": min(num_prompts, config.prompts.limit or num_prompts)})
        small = config.model_copy(update={"prompts": prompts, "out": str(Path(folder) / "data")})
        manifest = generate(small, listen)
        assert manifest is not None
    summary = manifest.summary
    worked = sum(end - start for start, end in spans)
    scale = preview.prompts.prompts / max(1, summary.groups)
    with_signal = summary.groups - summary.groups_without_signal - summary.groups_unjudged
    return Pilot(
        summary=summary,
        seconds=worked,
        share_with_signal=with_signal / max(1, summary.groups),
        expected_response_tokens=round(summary.response_tokens * scale),
        expected_bytes=round(sum(record.bytes for record in manifest.shards) * scale),
        expected_seconds=worked * scale,
    )
