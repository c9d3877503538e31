"""What the commands that write data sets tell whoever shows their progress."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened; may come from another thread."""

    kind: Literal["groups", "phase", "sample", "quarantined", "judged", "shard"]
    source: str = ""
    count: int = 0  # groups: of this task; phase: samples still to draw; shard: groups in it
    done: int = 0  # groups: published before
    tokens: int = 0
    reward: float | None = None


Listener = Callable[[Event], None]
