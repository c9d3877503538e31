"""Save and resume, on any number of ranks, without pickle: tensors as safetensors, the rest as JSON.

    OUT/checkpoints/step-00000064/
        shards/*.safetensors        what is trained and the optimizer's state, in pieces (torch.distributed.checkpoint)
        rank-00000.safetensors      what one rank alone knows: its random states and its extra tensors
        state.json                  position, schedule of the learning rate, names and shapes of all there is

A checkpoint is staged, made durable and renamed into place, so that a crash while saving leaves the one before.
"""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from gftdata.errors import UserError, first_line
from gftdata.sealed import read_sealed, sealed
from gftdata.shards import sha256_file
from gftdata.store import fsync_file, fsync_folder, read_file
from gfttrain.distributed import World, any_over, first_does, gather_json, reshard, together

FOLDER, SHARDS, STATE, EXTRA = "checkpoints", "shards", "state.json", "extra."
FILE_BYTES = 2**28  # of one file of shards: while it is written, a rank holds it twice in memory
NEXT = "delete this checkpoint, and the run goes on from the one before"
Kind = list[Any]  # of a tensor, as in state.json: ["float32", [576, 1536]]


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run stands: after `step` steps of the schedule that has this hash."""

    step: int
    schedule_hash: str


def latest(out: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    return max(_complete(out / FOLDER), default=None)


def read_position(checkpoint: Path) -> Position:
    """What a checkpoint says of itself. Raises UserError where it cannot be read."""
    state = _read_state(checkpoint)
    return Position(state["step"], state["schedule_hash"])


def save(
    out: Path,
    position: Position,
    world: World,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    extra_tensors: Mapping[str, torch.Tensor],
    keep: int,
) -> Path:
    """Write a checkpoint, then delete all but the newest `keep`. Collective: every rank calls it, between two steps.

    Frozen parameters are left out. `extra_tensors` are this rank's own. Where the checkpoint of this position is there
    already, nothing is written. Raises UserError, on all ranks, when the folder cannot be written.
    """
    target = out / FOLDER / _name(position.step)
    staged = target.with_name(f".{target.name}")
    with together(world):
        is_there = world.rank == 0 and target in _complete(target.parent) and read_position(target) == position
    if any_over(world, is_there):
        return target
    first_does(world, lambda: _make_room(staged))
    tensors = _model_tensors(model) | _optimizer_tensors(model, optimizer)
    with together(world), _blaming(f"{target}: cannot be written, and the checkpoint before it is whole"):
        # first what fails on all ranks or on none; its plans cross from rank to rank pickled, no file ever is
        writer = HuggingFaceStorageWriter(str(staged / SHARDS), _file_numbers(tensors, world), save_distributed=True)
        _collective(state_dict_saver.save, world, tensors, storage_writer=writer)
        own = staged / _own_file(world.rank)
        extra = {f"{EXTRA}{key}": tensor.detach().cpu().contiguous() for key, tensor in extra_tensors.items()}
        save_file(_random_states(world.device) | extra, own)
        paths = [own, *(staged / SHARDS).glob(f"shard-{world.rank + 1:05d}-*")]
        for path in paths:  # each rank its own: what another machine holds, it alone can bring to the disk
            fsync_file(path)
        files = {str(path.relative_to(staged)): _file_record(path) for path in paths}
    state = {
        "step": position.step,
        "schedule_hash": position.schedule_hash,
        "world_size": world.size,
        "scheduler": scheduler.state_dict(),
        "tensors": {name: _kind(tensor) for name, tensor in tensors.items()},
        "files": {name: record for part in gather_json(world, files) for name, record in part.items()},
    }
    first_does(world, lambda: _publish(staged, target, state, keep))
    return target


def restore(
    checkpoint: Path, world: World, model: torch.nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any
) -> dict[str, torch.Tensor]:
    """Put everything back as it was, in place; returns the extra tensors of all ranks. Collective.

    On as many ranks as saved it, training goes on with the same bits. On another number the values are the same, and
    the random states stay as they are. The optimizer may be new: its state is made here.
    Raises UserError, on all ranks, where the checkpoint is damaged or of another model.
    """
    with together(world):
        state = _read_state(checkpoint)
        for name, (size, _) in state["files"].items():
            found = (checkpoint / name).stat().st_size if (checkpoint / name).is_file() else 0
            if found != size:
                raise UserError(f"{checkpoint / name}: damaged: expected {size} bytes, found {found}; {NEXT}")
        for path in sorted((checkpoint / SHARDS).glob("*")):
            if f"{SHARDS}/{path.name}" not in state["files"]:  # what lies there is read, whoever put it there
                raise UserError(f"{path}: is not of this checkpoint; remove it, or {NEXT}")
        for name in sorted(state["files"])[world.rank :: world.size]:  # the ranks share the reading
            with _blaming(f"{checkpoint / name}: cannot be read; {NEXT}"):
                if _file_record(checkpoint / name) != state["files"][name]:
                    raise UserError(f"{checkpoint / name}: damaged: its content is not what was saved; {NEXT}")
        tensors = _model_tensors(model)
        _check_fits(checkpoint, state["tensors"], tensors)
        _make_optimizer_state(model, optimizer, state["tensors"])
        tensors |= _optimizer_tensors(model, optimizer)
    unreadable = f"{checkpoint}: cannot be read: when it can, the same command goes on from it"
    with together(world), _blaming(f"{checkpoint}: damaged; {NEXT}", unreadable):
        _collective(
            state_dict_loader.load, world, tensors, storage_reader=HuggingFaceStorageReader(str(checkpoint / SHARDS))
        )
        files = [_load(checkpoint / _own_file(rank)) for rank in range(state["world_size"])]
    scheduler.load_state_dict(state["scheduler"])
    for group, lr in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = lr
    if state["world_size"] == world.size:
        _set_random_states(files[world.rank], world.device)
    return {key[len(EXTRA) :]: tensor for file in files for key, tensor in file.items() if key.startswith(EXTRA)}


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except RuntimeError as error:  # how safetensors says that a file cannot be opened
        raise OSError(first_line(error)) from None


def _model_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What training changes: parameters, tied ones once, and buffers that belong to the weights."""
    reshard(model)
    in_weights = {_plain(name) for name in model.state_dict()}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if _plain(name) in in_weights]
    return {f"model.{_plain(name)}": tensor.detach() for name, tensor in (*trained, *buffers)}


def _optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"optim.{_plain(name)}.{key}": tensor
        for name, parameter in model.named_parameters()
        for key, tensor in optimizer.state.get(parameter, {}).items()
    }


def _make_optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Kind]) -> None:
    """Zeros of the saved names and shapes, sharded as the parameters are."""
    names = {parameter: _plain(name) for name, parameter in model.named_parameters()}
    states: dict[str, dict[str, Kind]] = {name: {} for name in names.values()}
    for full_name, kind in saved.items():
        program, _, rest = full_name.partition(".")
        name, _, key = rest.rpartition(".")
        if program == "optim":
            states[name][key] = kind
    for group in optimizer.param_groups:
        # as torch's Adam does: counters are on the CPU, where reading them does not wait for the device
        counters_on_device = group.get("capturable") or group.get("fused")
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                key: torch.zeros_like(parameter, dtype=getattr(torch, dtype), requires_grad=False)
                if key != "step" and shape == list(parameter.shape)
                else torch.zeros(
                    shape, dtype=getattr(torch, dtype), device=parameter.device if counters_on_device else "cpu"
                )
                for key, (dtype, shape) in states[names[parameter]].items()
            }


def _check_fits(checkpoint: Path, saved: Mapping[str, Kind], tensors: Mapping[str, torch.Tensor]) -> None:
    wanted = {name: _kind(tensor) for name, tensor in tensors.items()}
    found = {name: kind for name, kind in saved.items() if name.startswith("model.")}
    for name in (*wanted, *found):
        if found.get(name) != wanted.get(name):
            of_model, of_checkpoint = (" ".join(map(str, kinds.get(name, ["nothing"]))) for kinds in (wanted, found))
            raise UserError(
                f"{checkpoint}: of another model or other settings: {name.removeprefix('model.')} is {of_model} in the "
                f"model and {of_checkpoint} in the checkpoint; restore the settings, or name another run folder (out)"
            )


def _kind(tensor: torch.Tensor) -> Kind:
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


def _plain(name: str) -> str:
    """A parameter's name without the parts that compiling and activation checkpointing put in."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def _file_numbers(tensors: Mapping[str, torch.Tensor], world: World) -> dict[str, int]:
    """Which of a rank's files, from 1, each tensor goes to."""
    before = accumulate((tensor.numel() * tensor.element_size() for tensor in tensors.values()), initial=0)
    return {name: 1 + size // (FILE_BYTES * world.size) for name, size in zip(tensors, before, strict=False)}


def _own_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _random_states(device: torch.device) -> dict[str, torch.Tensor]:
    cpu = {"rng.cpu": torch.get_rng_state()}
    return cpu if device.type == "cpu" else {**cpu, "rng.device": torch.get_device_module(device).get_rng_state()}


def _set_random_states(saved: Mapping[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(saved["rng.cpu"])
    if device.type != "cpu" and "rng.device" in saved:
        torch.get_device_module(device).set_rng_state(saved["rng.device"])


def _collective(
    function: Callable[..., object], world: World, tensors: dict[str, torch.Tensor], **storage: Any
) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # so it is, when alone
        function(tensors, no_dist=world.size == 1, **storage)


@contextmanager
def _blaming(what: str, storage: str | None = None) -> Iterator[None]:
    """Say of every failure what it means to the run; `storage`: of the system's own errors, which speak of no content.

    A file that is not there speaks of the content.
    """
    try:
        yield
    except (CheckpointException, OSError, SafetensorError) as error:
        # the first is not an Exception; it holds what happened, by rank
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        of_storage = isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)
        said = storage if storage is not None and of_storage else what
        raise UserError(f"{said} ({first_line(cause)})") from None


def _complete(folder: Path) -> list[Path]:
    """Raises OSError for a folder that cannot be looked into, where a glob would find nothing."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.name.startswith("step-") and (path / STATE).exists())


def _read_state(checkpoint: Path) -> dict[str, Any]:
    keys = {"step", "schedule_hash", "world_size", "scheduler", "tensors", "files"}
    where = checkpoint / STATE
    content = read_file(where)
    try:
        state = read_sealed(content, str(where), "the state of a checkpoint")
    except UserError as error:
        raise UserError(f"{error}; {NEXT}") from None
    if missing := keys - state.keys():
        raise UserError(f"{where}: has no {', '.join(sorted(missing))}; {NEXT}")
    if checkpoint.name.removeprefix(".") != _name(state["step"]):
        raise UserError(f"{where}: is the state after step {state['step']}, in the wrong folder; {NEXT}")
    if not all(isinstance(record, list) and len(record) == 2 for record in state["files"].values()):
        raise UserError(f"{where}: was saved by an earlier gft, without checksums; {NEXT}")
    return state


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _make_room(staged: Path) -> None:
    with _blaming(f"{staged.parent}: no checkpoint can be written"):
        for left in staged.parent.glob(".step-*"):  # by a process that was killed
            if left.exists():
                shutil.rmtree(left)
        (staged / SHARDS).mkdir(parents=True)


def _publish(staged: Path, target: Path, state: Mapping[str, Any], keep: int) -> None:
    for name in state["files"]:
        if not (staged / name).is_file():
            raise UserError(f"{staged / name}: not seen from rank 0: `out` must be in a folder that all machines share")
    with _blaming(f"{target}: cannot be written, and the checkpoint before it is whole"):
        (staged / STATE).write_text(json.dumps(sealed(state)))
        fsync_file(staged / STATE)
        fsync_folder(staged / SHARDS)
        fsync_folder(staged)
        if target.exists():  # not complete, or of another schedule
            shutil.rmtree(target)
        staged.rename(target)
        fsync_folder(target.parent)
        # looked at once: on a shared file system one of two looks may be older than the other
        there = [path for path in target.parent.iterdir() if path.name.startswith("step-") and path.exists()]
        kept = sorted({target, *(path for path in there if (path / STATE).exists())})[-keep:]
        for old in set(there).difference(kept):
            # renamed first: one that is deleted in part must not look complete
            shutil.rmtree(old.rename(old.with_name(f".{old.name}")))


def _file_record(path: Path) -> list[int | str]:
    """Bytes and sha256; safetensors itself has no checksum."""
    return [path.stat().st_size, sha256_file(path)]
