"""What the study asks: which runs, and which of them stand in one table. Nothing runs here.

A condition is run once for each seed, whatever number of questions it is part of. A seed stands for everything that is
drawn: the self samples of the data set, the order of the groups.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from gfttrain.presets import METHODS


@dataclass(frozen=True, slots=True)
class Groups:
    """Responses of each source in a group."""

    expert: int = 1
    teacher: int = 0
    own: int = 7


@dataclass(frozen=True, slots=True)
class Condition:
    """One way to train."""

    name: str
    groups: Groups = Groups()
    objective: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)  # settings that differ from the study's, by dotted name
    base: str = ""  # a weaker model to start from; empty: the study's
    start: str = ""  # the condition whose trained model this one starts from, and draws its samples from
    redraw_every: int | None = None  # draw the self samples anew every so many steps, with the optimizer kept ...
    adam_anew: bool = False  # ... or begun anew each time
    watched: bool = False  # evaluated during training


@dataclass(frozen=True, slots=True)
class Question:
    """A table."""

    name: str
    title: str
    conditions: tuple[Condition, ...]
    teacher: bool = False  # needs a teacher's responses


PAPER_GROUPS = Groups(expert=1, teacher=3, own=4)
SHOWN_METHODS = ("SFT", "RFT", "DFT", "DFT + anchor", "PSFT", "GRPO (offline)", "GFT w/o GAL", "GFT w/o DCR", "GFT")
TEACHER_METHODS = (
    "SFT",
    "SFT (mix)",
    "RFT",
    "DFT",
    "GRPO (offline)",
    "GFT w/o GAL",
    "GFT w/o DCR",
    "GFT (no mix)",
    "GFT",
)
TAUS = (0.1, 0.5, 1.01)  # beside 0 (GFT w/o DCR) and 0.7 (GFT); above 1 every token is weighed by pi
MIXES = (Groups(1, 7, 0), Groups(1, 5, 2), Groups(1, 3, 4), Groups(1, 1, 6), Groups(0, 0, 8))
REDRAWN = (1, 16, 32)  # of 64 steps
POSITIVES = {"advantage_floor": -1e-9}  # negative advantages count for nothing
WEAK = ("weak-1", "weak-2", "weak-3", "weak-4", "")

GFT = Condition("GFT")
PLAIN = {name: Condition(name, objective=METHODS[name].model_dump()) for name in SHOWN_METHODS} | {"GFT": GFT}
TAU = [Condition(f"GFT tau {tau:g}", objective={"tau": tau}) for tau in TAUS]
FLOORS = {"floor -1": {"advantage_floor": -1.0}, "positives": POSITIVES}
TEACHER = {name: Condition(f"{name}, teacher", PAPER_GROUPS, METHODS[name].model_dump()) for name in TEACHER_METHODS}
# is it what is pushed down that holds GFT back there?
TEACHER |= {name: Condition(f"{name}, teacher", PAPER_GROUPS, floor) for name, floor in FLOORS.items()}
MIXED = [Condition(f"{mix.expert + mix.teacher}:{mix.own}", mix) for mix in MIXES]
FROZEN = [
    *(Condition(f"drawn every {every}", redraw_every=every) for every in REDRAWN),
    Condition("drawn every 32, Adam anew", redraw_every=32, adam_anew=True),
    Condition("drawn every 16, Adam anew", redraw_every=16, adam_anew=True),
    Condition("2 rounds, first", train={"epochs": 2}),
    Condition("2 rounds", train={"epochs": 2}, start="2 rounds, first"),
    Condition("4 rounds, first", train={"epochs": 1}),
    Condition("4 rounds, second", train={"epochs": 1}, start="4 rounds, first"),
    Condition("4 rounds, third", train={"epochs": 1}, start="4 rounds, second"),
    Condition("4 rounds", train={"epochs": 1}, start="4 rounds, third"),
]
ROUNDS = [
    Condition("positives", objective=POSITIVES),
    Condition("8 epochs", train={"epochs": 8}),
    Condition("positives, 8 epochs", objective=POSITIVES, train={"epochs": 8}),
    Condition("round 2", start="GFT"),
    Condition("round 3", start="round 2"),
    Condition("round 2, lr / 3", start="GFT", train={"optim.lr": 3.3e-5}),
    *(Condition(f"round 2, {name}", start="GFT", objective=floor) for name, floor in FLOORS.items()),
    Condition("round 2, filtered", start="GFT", train={"filter.min_pass": 0.1, "filter.max_pass": 0.8}),
]
FROM_WEAK = [
    condition
    for base in WEAK
    for condition in (
        Condition(f"GFT, {base or 'demo'}", base=base, watched=True),
        Condition(f"RFT, {base or 'demo'}", objective=METHODS["RFT"].model_dump(), base=base, watched=True),
    )
]

QUESTIONS = (
    Question("methods", "Which method? One expert response and seven of the model's own", tuple(PLAIN.values())),
    Question("teacher", "The same with a teacher: 1 expert, 3 teacher, 4 self", tuple(TEACHER.values()), teacher=True),
    Question(
        "ablation",
        "Group Advantage Learning x Dynamic Coefficient Rectification",
        (PLAIN["SFT"], PLAIN["GFT w/o GAL"], PLAIN["GFT w/o DCR"], GFT),
    ),
    Question("tau", "Where to rectify: tau", (PLAIN["GFT w/o DCR"], *TAU[:2], GFT, TAU[2])),
    Question("composition", "Demonstrations : self samples, of K = 8", tuple(MIXED), teacher=True),
    Question(
        "frozen",
        "What freezing the self samples loses: 64 steps, samples drawn anew every so many of them",
        (GFT, FROZEN[2], FROZEN[1], FROZEN[0], FROZEN[3], FROZEN[4], FROZEN[6], FROZEN[10]),
    ),
    Question("rounds", "Further rounds of 64 steps, and what mends them", (GFT, *ROUNDS)),
    Question("weak", "From which base on: weaker models", tuple(FROM_WEAK)),
)
EVERY = {c.name: c for c in (*PLAIN.values(), *TEACHER.values(), *TAU, *MIXED, *FROZEN, *ROUNDS, *FROM_WEAK)}
SHOWN = {c.name for question in QUESTIONS for c in question.conditions}  # the others are steps on the way to one


def needed(questions: Iterable[Question]) -> list[Condition]:
    """Their conditions, each once, and those whose models others start from before these."""
    found: dict[str, Condition] = {}

    def add(condition: Condition) -> None:
        if condition.start:
            add(EVERY[condition.start])
        found.setdefault(condition.name, condition)

    for question in questions:
        for condition in question.conditions:
            add(condition)
    return list(found.values())
