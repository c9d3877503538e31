"""The presets are the rows of the paper's comparison, objective by objective."""

import numpy as np
import pytest
from training_helpers import make_index

from gfttrain.config import ObjectiveConfig
from gfttrain.plan import select
from gfttrain.presets import METHODS, folder_name

SOURCES = ("expert", "teacher:a", "teacher:b", "self", "self", "self")
REWARDS = (1.0, 1.0, 0.0, 1.0, 0.0, None)

# method -> used responses, advantages (None: the group's), what the coefficient and the penalty are
TABLE: dict[str, tuple[list[int], float | None, str, bool]] = {
    "SFT": ([0], 1.0, "1", False),
    "SFT (mix)": ([0, 1, 2], 1.0, "1", False),
    "RFT": ([0, 1, 3], 1.0, "1", False),
    "DFT": ([0], 1.0, "pi", False),
    "DFT + anchor": ([0], 1.0, "pi", True),
    "PSFT": ([0], 1.0, "ratio refreshed", False),
    "GRPO (offline)": ([3, 4], None, "ratio reference", False),
    "GFT w/o GAL": ([0, 1, 2], 1.0, "rectified", False),
    "GFT w/o DCR": ([0, 1, 2, 3, 4], None, "1", False),
    "GFT (no mix)": ([0, 3, 4], None, "rectified", False),
    "GFT": ([0, 1, 2, 3, 4], None, "rectified", False),
}


def coefficient(objective: ObjectiveConfig) -> str:
    if objective.coefficient == "clipped_ratio":
        return f"ratio {objective.old_policy}"
    return "1" if objective.tau == 0 else "pi" if objective.tau > 1 else "rectified"


def test_every_method_of_the_paper_is_there() -> None:
    assert list(METHODS) == list(TABLE)
    assert METHODS["GFT"] == ObjectiveConfig()


@pytest.mark.parametrize("method", TABLE)
def test_method(method: str) -> None:
    used, advantage, weight, anchored = TABLE[method]
    objective = METHODS[method]
    index = make_index([[(s, r, 3) for s, r in zip(SOURCES, REWARDS, strict=True)]])
    selection = select(index, objective)
    assert np.flatnonzero(selection.used_R).tolist() == used
    rewards = np.array([REWARDS[k] for k in used], dtype=np.float64)
    expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6) if advantage is None else advantage
    np.testing.assert_allclose(selection.advantages_R[used], expected, rtol=1e-12)
    assert not np.delete(selection.advantages_R, used).any()
    assert coefficient(objective) == weight
    assert (objective.kl_coef > 0) == anchored


def test_folder_names_are_plain_and_distinct() -> None:
    names = [folder_name(method) for method in METHODS]
    assert len(set(names)) == len(names)
    assert all(name.replace("-", "").isalnum() for name in names)
    assert folder_name("GFT w/o DCR") == "gft-wo-dcr"
