"""The paper's methods and their neighbours by name: each is the same trainer with another objective.

Their configs in samples/objectives are the one place where the objectives are defined. No torch here.
"""

from pathlib import Path

from gftdata.config import load_config
from gftdata.errors import UserError
from gfttrain.config import ObjectiveConfig, TrainConfig

# in the order of the paper's table
NAMES = (
    "SFT",
    "SFT (mix)",
    "RFT",
    "DFT",
    "DFT + anchor",
    "PSFT",
    "GRPO (offline)",
    "GFT w/o GAL",
    "GFT w/o DCR",
    "GFT (no mix)",
    "GFT",
)


def objectives_folder() -> Path:
    """`samples/objectives` of a checkout, or the copy that an installed package carries."""
    here = Path(__file__).resolve().parent
    for folder in (here / "objectives", here.parent / "samples" / "objectives"):
        if (folder / "gft.yaml").is_file():
            return folder
    raise UserError("the objectives' configs are not installed; install gft-toolkit anew, or run it from a checkout")


def folder_name(method: str) -> str:
    """`GFT w/o DCR` -> gft-wo-dcr: the method's run folder, and its config in `objectives_folder`."""
    kept = method.lower().replace("w/o", "wo").replace("(", "").replace(")", "").replace("+", "plus")
    return "-".join(kept.split())


def methods() -> dict[str, ObjectiveConfig]:
    """Each method's objective, from its config, which is the one place where it is defined."""
    folder = objectives_folder()
    return {name: load_config(TrainConfig, folder / f"{folder_name(name)}.yaml").objective for name in NAMES}


METHODS = methods()
