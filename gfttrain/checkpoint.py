"""Save and resume, without pickle: tensors as safetensors, the rest as JSON.

    OUT/checkpoints/step-00000064/  model.safetensors optimizer.safetensors state.json

A checkpoint is staged, made durable and renamed into place, so that a crash while saving leaves the one before.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model

from gftdata.errors import UserError
from gftdata.shards import fsync_folder

FOLDER = "checkpoints"


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run stands: after `step` steps of the schedule that has this hash."""

    step: int
    schedule_hash: str


def latest(out: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    found = sorted((out / FOLDER).glob("step-*/state.json"))
    return found[-1].parent if found else None


def save(
    out: Path,
    position: Position,
    model: Any,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    old_logprobs: dict[str, torch.Tensor],
    keep: int,
) -> Path:
    """Write a checkpoint and delete all but the newest `keep`."""
    target = out / FOLDER / f"step-{position.step:08d}"
    staged = out / FOLDER / f".step-{position.step:08d}"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    save_model(model, str(staged / "model.safetensors"))
    save_file(_optimizer_tensors(optimizer), staged / "optimizer.safetensors")
    save_file(
        {"rng": torch.get_rng_state(), **_device_rng(), **{f"old.{k}": t for k, t in old_logprobs.items()}},
        staged / "random.safetensors",
    )
    state = {"step": position.step, "schedule_hash": position.schedule_hash, "scheduler": scheduler.state_dict()}
    (staged / "state.json").write_text(json.dumps(state, indent=2))
    for path in staged.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(target, ignore_errors=True)
    staged.rename(target)
    fsync_folder(target.parent)
    for old in sorted((out / FOLDER).glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return target


def read_position(checkpoint: Path) -> Position:
    """What a checkpoint says of itself."""
    state = json.loads((checkpoint / "state.json").read_bytes())
    return Position(state["step"], state["schedule_hash"])


def restore(
    checkpoint: Path, model: Any, optimizer: torch.optim.Optimizer, scheduler: Any, device: torch.device
) -> dict[str, torch.Tensor]:
    """Put everything back as it was; returns the old policy's log-probs (see `train.py`)."""
    try:
        load_model(model, str(checkpoint / "model.safetensors"))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{checkpoint}: does not fit the model: {str(error).splitlines()[0]}") from None
    tensors = load_file(checkpoint / "optimizer.safetensors", device=str(device))
    groups = optimizer.state_dict()["param_groups"]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, key = name.partition(".")
        # AdamW keeps its step count on the CPU
        state.setdefault(int(number), {})[key] = tensor.cpu() if key == "step" else tensor
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    scheduler.load_state_dict(json.loads((checkpoint / "state.json").read_bytes())["scheduler"])
    for group, lr in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = lr
    random = load_file(checkpoint / "random.safetensors")
    torch.set_rng_state(random["rng"])
    if "device_rng" in random and torch.accelerator.is_available():
        torch.get_device_module(device).set_rng_state(random["device_rng"])
    return {name.removeprefix("old."): t for name, t in random.items() if name.startswith("old.")}


def _device_rng() -> dict[str, torch.Tensor]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return {} if accelerator is None else {"device_rng": torch.get_device_module(accelerator).get_rng_state()}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{number}.{key}": t.contiguous() for number, values in state.items() for key, t in values.items()}
