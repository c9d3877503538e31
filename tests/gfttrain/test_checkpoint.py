"""What runs in other processes is below, in functions that are started as `python test_checkpoint.py NAME FOLDER`."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional

from gftdata.errors import UserError
from gfttrain import checkpoint
from gfttrain.checkpoint import Position, latest, read_position, restore, save
from gfttrain.distributed import World, alone, end_rank, join, launch, leave, sum_gradients

ALONE = alone(torch.device("cpu"))
Tensors = dict[str, torch.Tensor]


class TinyModel(torch.nn.Module):
    """Tied embeddings, sizes that two ranks cannot share evenly, a frozen layer, buffers, and dropout."""

    def __init__(self, vocab: int = 7, width: int = 5, bias: bool = True) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab, width)
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Tanh()) for _ in range(2)
        )
        self.frozen = torch.nn.Linear(width, width).requires_grad_(False)
        torch.nn.init.eye_(self.frozen.weight)  # the same in all models, as of a base model that is loaded
        torch.nn.init.ones_(self.frozen.bias)
        self.one = torch.nn.Linear(width, 1, bias=bias)  # less than a row for each rank
        self.head = torch.nn.Linear(width, vocab, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("scratch", torch.ones(3), persistent=False)

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        hidden_BTD = self.frozen(self.embedding(ids_BT))
        for block in self.blocks:
            hidden_BTD = functional.dropout(block(hidden_BTD), 0.2)
        logits_BTV = self.head(hidden_BTD) + self.one(hidden_BTD)
        return functional.cross_entropy(logits_BTV.flatten(0, 1), ids_BT.flatten(), reduction="sum")


class Training:
    """A model, its optimizer and scheduler, on the ranks of `world`."""

    def __init__(self, world: World, seed: int = 0, **model: Any) -> None:
        torch.manual_seed(seed)
        self.world: World = world
        self.model: Any = TinyModel(**model)
        if world.size > 1:
            for block in self.model.blocks:
                fully_shard(block)
            fully_shard(self.model)
            sum_gradients(self.model)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        torch.manual_seed(seed + 100 * world.rank)

    def parts(self) -> tuple[World, torch.nn.Module, torch.optim.Optimizer, Any]:
        return self.world, self.model, self.optimizer, self.scheduler

    def steps(self, *numbers: int) -> "Training":
        for number in numbers:
            ids_BT = torch.randint(0, 7, (4, 3), generator=torch.Generator().manual_seed(number))
            self.model(ids_BT[self.world.rank :: self.world.size]).backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        return self

    def save(self, out: Path, step: int, extra: Tensors | None = None, keep: int = 2) -> Path:
        return save(out, Position(step, "hash"), *self.parts(), extra or {}, keep)

    def everything(self) -> Tensors:
        """Weights, buffers and optimizer state, whole, and the learning rate. Collective."""
        tensors = dict(self.model.state_dict())
        for name, parameter in self.model.named_parameters():
            tensors |= {f"{name}/{key}": value for key, value in self.optimizer.state.get(parameter, {}).items()}
        whole = {name: t.full_tensor() if isinstance(t, DTensor) else t.clone() for name, t in tensors.items()}
        del whole["head.weight"]
        return {**whole, "lr": torch.tensor(self.optimizer.param_groups[0]["lr"], dtype=torch.float64)}


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def python(name: str, folder: Path) -> list[str]:
    return [sys.executable, __file__, name, str(folder)]


def test_alone_training_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    training = Training(ALONE).steps(1, 2, 3)
    whole = torch.randn(6)
    old = {"3.1": whole[:4], "7.0": whole[4:], "8.0": torch.randn(2, 3).T}  # views, and not contiguous
    path = training.save(tmp_path, 3, old)
    assert path == latest(tmp_path) == tmp_path / "checkpoints" / "step-00000003"
    assert read_position(path) == Position(3, "hash")
    expected_then = training.everything()
    expected = training.steps(4, 5).everything()

    other = Training(ALONE, seed=1)
    assert_equal(restore(path, *other.parts()), old)
    assert_equal(other.everything(), expected_then)
    assert other.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 4)
    assert_equal(other.steps(4, 5).everything(), expected)
    used = Training(ALONE, seed=2).steps(7, 8)  # an optimizer that has been used already
    restore(path, *used.parts())
    assert_equal(used.steps(4, 5).everything(), expected)


def test_before_the_first_step(tmp_path: Path) -> None:
    training = Training(ALONE)
    path = training.save(tmp_path, 0)
    expected = training.steps(1, 2).everything()
    other = Training(ALONE, seed=1).steps(1)
    assert restore(path, *other.parts()) == {}
    assert_equal(other.steps(1, 2).everything(), expected)


def test_a_checkpoint_holds_what_is_trained_and_no_pickle(tmp_path: Path) -> None:
    path = Training(ALONE).steps(1).save(tmp_path, 1)
    names = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert names == {"state.json", "rank-00000.safetensors", "shards/shard-00001-model-00001-of-00001.safetensors"}
    tensors = load_file(path / "shards" / "shard-00001-model-00001-of-00001.safetensors")
    assert {name for name in tensors if name.startswith("model.")} == {
        "model.embedding.weight",  # tied: once
        *(f"model.blocks.{number}.0.{kind}" for number in range(2) for kind in ("weight", "bias")),
        *("model.one.weight", "model.one.bias", "model.seen"),
    }
    assert {name for name in tensors if "embedding" in name} == {
        "model.embedding.weight",
        *(f"optim.embedding.weight.{key}" for key in ("step", "exp_avg", "exp_avg_sq")),
    }
    state = json.loads((path / "state.json").read_bytes())
    assert state["tensors"]["model.embedding.weight"] == ["float32", [7, 5]] and state["world_size"] == 1
    assert state["tensors"].keys() == tensors.keys()


def test_all_dtypes_and_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def parts(fill: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.nn.Module, torch.optim.Optimizer, Any]:
        model = torch.nn.Module()
        floats = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        for number, (dtype, shape) in enumerate((dtype, shape) for dtype in floats for shape in [(), (0, 3), (2, 3)]):
            model.register_parameter(f"p{number}", torch.nn.Parameter(fill(torch.ones(shape, dtype=dtype))))
        for number, dtype in enumerate((torch.int64, torch.uint8, torch.bool)):
            model.register_buffer(f"b{number}", fill(torch.ones(3, dtype=dtype)))
        optimizer = torch.optim.AdamW(model.parameters())
        return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    monkeypatch.setattr(checkpoint, "FILE_BYTES", 20)  # many files
    torch.manual_seed(0)
    model, optimizer, scheduler = parts(
        lambda t: torch.randn(t.shape).to(t.dtype) if t.dtype.is_floating_point else t.cumsum(0).to(t.dtype)
    )
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape).to(parameter.dtype)
    optimizer.step()
    path = save(tmp_path, Position(1, "hash"), ALONE, model, optimizer, scheduler, {}, 1)
    assert len(list((path / "shards").iterdir())) > 3
    found, found_optimizer, found_scheduler = parts(torch.zeros_like)
    restore(path, ALONE, found, found_optimizer, found_scheduler)
    assert_equal(found.state_dict(), model.state_dict())
    for of_found, of_model in zip(found.parameters(), model.parameters(), strict=True):
        assert_equal(found_optimizer.state[of_found], optimizer.state[of_model])


def test_names_do_not_depend_on_wrapping(tmp_path: Path) -> None:
    training = Training(ALONE).steps(1, 2)
    path = training.save(tmp_path, 2)
    other = Training(ALONE, seed=1)
    model, other.model = other.model, torch.nn.ModuleDict({"_orig_mod": other.model})  # as torch.compile does
    restore(path, *other.parts())
    assert torch.equal(model.embedding.weight, training.model.embedding.weight) and model.seen == 2


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    training = Training(ALONE).steps(1)
    folder = tmp_path / "checkpoints"
    for step in range(1, 5):
        training.save(tmp_path, step, keep=2)
        assert sorted(path.name for path in folder.iterdir()) == [f"step-{n:08d}" for n in (step - 1, step) if n]


def test_the_same_position_is_saved_once(tmp_path: Path) -> None:
    training = Training(ALONE).steps(1)
    path = training.save(tmp_path, 1)
    before = (path / "state.json").stat().st_mtime_ns
    assert training.save(tmp_path, 1) == path
    assert (path / "state.json").stat().st_mtime_ns == before
    save(tmp_path, Position(1, "other schedule"), *training.parts(), {}, 1)
    assert read_position(path) == Position(1, "other schedule")


def test_a_half_written_checkpoint_is_not_used(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    training = Training(ALONE).steps(1)
    path = training.save(tmp_path, 1)
    folder = path.parent
    shutil.copytree(path, folder / ".step-00000002")  # killed before the renaming
    shutil.copytree(path, folder / ".step-00000003")
    (folder / "step-00000003").mkdir()  # not one of ours: without state.json it is not complete
    assert latest(tmp_path) == path
    training.save(tmp_path, 3)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000003"]
    assert latest(tmp_path) == folder / "step-00000003"


def test_killed_while_saving(tmp_path: Path) -> None:
    done = subprocess.run(python("kills", tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "ok"


def test_checkpoints_that_cannot_be_looked_at_are_not_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there seems to be none, a run begins anew, and deletes them."""
    path = Training(ALONE).steps(1).save(tmp_path, 1)

    def denied(*args: object) -> None:
        raise PermissionError(13, "Permission denied", str(path.parent))

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, denied)
    with pytest.raises(PermissionError):
        latest(tmp_path)


def test_a_disk_that_fails_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged checkpoint is to be deleted; one that cannot be read now is not."""
    training = Training(ALONE).steps(1)
    path = training.save(tmp_path, 1)

    def fails(*args: object, **kwargs: object) -> None:
        raise OSError(5, "Input/output error")

    def cannot_open(path: Path) -> None:  # as safetensors says it
        raise RuntimeError(f"unable to open file <{path}> in read-only mode: Permission denied (13)")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "load_file", fails)
        with pytest.raises(UserError, match="cannot be read: when it can, the same command goes on") as caught:
            restore(path, *training.parts())
        assert "delete" not in str(caught.value)
        patch.setattr(checkpoint, "load_file", cannot_open)
        with pytest.raises(UserError, match=r"cannot be read: .*unable to open file"):
            restore(path, *training.parts())
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fails)
        with pytest.raises(OSError, match=r"Input/output error: '.*state.json'"):
            read_position(path)


def test_a_listing_that_is_old_costs_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a shared file system: rank 0 does not see, in one look or in all, what it has just written."""
    training = Training(ALONE).steps(1)
    first = training.save(tmp_path, 1)
    listdir, looks = os.listdir, []

    def old(folder: Any) -> list[str]:
        looks.append(folder)
        return [name for name in listdir(folder) if len(looks) % 2 or name != "step-00000002"]

    monkeypatch.setattr(os, "listdir", old)
    second = training.steps(2).save(tmp_path, 2)
    monkeypatch.undo()
    assert looks and (second / "state.json").exists() and first != second


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"width": 6}, r"embedding.weight is float32 \[7, 6\] in the model and float32 \[7, 5\] in the checkpoint"),
        ({"bias": False}, r"one.bias is nothing in the model and float32 \[1\] in the checkpoint"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(model: Any, message: str, tmp_path: Path) -> None:
    path = Training(ALONE).steps(1).save(tmp_path, 1)
    other = Training(ALONE, **model)
    before = other.everything()
    with pytest.raises(UserError, match=f"of another model or other settings: {message}"):
        restore(path, *other.parts())
    assert_equal(other.everything(), before)


def test_other_settings_are_refused(tmp_path: Path) -> None:
    path = Training(ALONE, bias=False).steps(1).save(tmp_path, 1)
    other = Training(ALONE)
    with pytest.raises(UserError, match=r"one.bias is float32 \[1\] in the model and nothing in the checkpoint"):
        restore(path, *other.parts())
    other = Training(ALONE, bias=False)
    other.model.to(torch.bfloat16)
    with pytest.raises(UserError, match=r"embedding.weight is bfloat16 \[7, 5\] in the model and float32 \[7, 5\]"):
        restore(path, *other.parts())


def test_damage_is_found(tmp_path: Path) -> None:
    path = Training(ALONE).steps(1).save(tmp_path, 1)
    shard = path / "shards" / "shard-00001-model-00001-of-00001.safetensors"
    whole = {file: file.read_bytes() for file in (shard, path / "rank-00000.safetensors", path / "state.json")}

    def refuses(match: str) -> None:
        with pytest.raises(UserError, match=match) as error:
            restore(path, *Training(ALONE).parts())
        assert "delete this checkpoint, and the run goes on from the one before" in str(error.value)
        assert "\n" not in str(error.value)
        for file, content in whole.items():
            file.write_bytes(content)

    for file in list(whole)[:2]:
        file.unlink()
        refuses(f"{file.name}: damaged: expected {len(whole[file])} bytes, found 0")
        file.write_bytes(whole[file][:-8])
        refuses(f"{file.name}: damaged: expected")
        file.write_bytes(b"\xff" * len(whole[file]))
        refuses(f"{file.name}: damaged: its content is not what was saved")
        middle = len(whole[file]) // 2
        file.write_bytes(whole[file][:middle] + bytes([whole[file][middle] ^ 1]) + whole[file][middle + 1 :])
        refuses(f"{file.name}: damaged: its content is not what was saved")
    (path / "state.json").write_text('{"step": 1')
    with pytest.raises(UserError, match=r"state.json: not the state of a checkpoint"):
        read_position(path)
    refuses("state.json: not the state of a checkpoint")
    (path / "state.json").write_bytes(whole[path / "state.json"].replace(b'"step": 1,', b'"step": 2,'))
    refuses("state.json: damaged or changed: its checksum")
    (path / "state.json").write_text('{"step": 1}')
    refuses("state.json: has no files, schedule_hash, scheduler, tensors, world_size")
    moved = path.with_name("step-00000007")
    path.rename(moved)
    with pytest.raises(UserError, match=r"step-00000007/state.json: is the state after step 1, in the wrong folder"):
        restore(moved, *Training(ALONE).parts())
    moved.rename(path)
    restore(path, *Training(ALONE).parts())


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match="no checkpoint can be written") as error:
        Training(ALONE).save(tmp_path, 1)
    assert "\n" not in str(error.value)


def test_two_ranks_and_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    training = Training(ALONE).steps(1, 2)
    training.save(tmp_path / "of-1", 2, {"of 0": torch.ones(1)})
    save_file(training.everything(), tmp_path / "of-1.safetensors")
    assert launch(2, python("two_ranks", tmp_path)) == 0
    assert capfd.readouterr().err == ""

    path = latest(tmp_path / "of-2")
    assert path is not None
    assert {file.suffix for file in path.rglob("*") if file.is_file()} == {".safetensors", ".json"}
    other = Training(ALONE, seed=1)
    random_state = torch.get_rng_state()
    assert_equal(restore(path, *other.parts()), {"of 0": torch.zeros(2), "of 1": torch.ones(3)})
    assert_equal(other.everything(), load_file(tmp_path / "of-2.safetensors"))
    assert torch.equal(torch.get_rng_state(), random_state)
    other.steps(4)


def two_ranks(folder: str) -> None:
    world = join("cpu")
    one, two = Path(folder) / "of-1", Path(folder) / "of-2"

    # of 1 -> on 2
    saved = latest(one)
    assert saved is not None
    training = Training(world, seed=1)
    assert isinstance(training.model.embedding.weight, DTensor)
    assert_equal(restore(saved, *training.parts()), {"of 0": torch.ones(1)})
    assert_equal(training.everything(), load_file(one.with_suffix(".safetensors")))

    # of 2 -> on 2, saved after an evaluation, which leaves the root module unsharded
    training.steps(3)
    with torch.no_grad():
        training.model(torch.ones(1, 3, dtype=torch.int64))
    path = training.save(two, 3, {f"of {world.rank}": torch.full((2 + world.rank,), float(world.rank))})
    expected_then = training.everything()
    if world.rank == 0:
        save_file(expected_then, two.with_suffix(".safetensors"))
    expected = training.steps(4, 5).everything()
    assert training.save(two, 3) == path
    other = Training(world, seed=2)
    assert len(restore(path, *other.parts())) == 2
    assert_equal(other.everything(), expected_then)
    assert_equal(other.steps(4, 5).everything(), expected)

    # mistakes are everybody's, and no rank waits for another
    with pytest.raises(UserError, match="of another model"):
        restore(path, *Training(world, width=4).parts())
    with pytest.MonkeyPatch.context() as patch:

        def fails(*args: object) -> None:
            raise OSError("No space left on device")

        if world.rank == 1:
            patch.setattr(checkpoint, "save_file", fails)
        with pytest.raises(UserError, match=r"step-00000005: cannot be written, .* \(No space left on device\)"):
            training.save(two, 5)
    assert latest(two) == path
    leave(world)


def kills(folder: str) -> None:
    """Processes that save are killed, each goes on from what the one before has left, and that is always whole."""
    out = Path(folder)
    seen = [0]

    def restored() -> tuple[Training, int]:
        training, path = Training(ALONE), latest(out)
        if path is None:
            return training, 0
        step = read_position(path).step
        assert restore(path, *training.parts())["step"].item() == step
        assert all((parameter == step).all() for parameter in training.model.blocks.parameters())
        return training, step

    def save_next(training: Training, step: int) -> None:
        with torch.no_grad():
            for parameter in training.model.blocks.parameters():
                parameter.fill_(step)
        training.save(out, step, {"step": torch.tensor(step)}, keep=1)

    def child(work: Callable[[Training, int], None]) -> int:
        if (process := os.fork()) == 0:
            try:
                work(*restored())
            finally:
                os._exit(1)
        return process

    # at random moments
    def save_on(training: Training, step: int) -> None:
        while os.getppid() == parent:
            step += 1
            save_next(training, step)

    parent = os.getpid()
    for number in range(8):
        before, began = latest(out), time.monotonic()
        process = child(save_on)
        while number < 4 and latest(out) == before and time.monotonic() < began + 60:
            time.sleep(0.01)
        time.sleep(random.random() * 0.2)
        os.kill(process, signal.SIGKILL)
        assert os.waitpid(process, 0)[1] == signal.SIGKILL
        seen.append(restored()[1])
        assert seen[-1] >= seen[-2]
    assert seen[-1] > 4

    # before each single thing that saving does to the disk
    def save_until(moment: int) -> Callable[[Training, int], None]:
        def work(training: Training, step: int) -> None:
            done = 0

            def counted(function: Callable[..., Any]) -> Callable[..., Any]:
                def replacement(*args: Any, **kwargs: Any) -> Any:
                    nonlocal done
                    done += 1
                    if done == moment:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*args, **kwargs)

                return replacement

            for owner, name in (
                (os, "fsync"),
                (Path, "mkdir"),
                (Path, "write_text"),
                (Path, "rename"),
                (shutil, "rmtree"),
            ):
                setattr(owner, name, counted(getattr(owner, name)))
            save_next(training, step + 1)

        return work

    moment, code = 0, int(signal.SIGKILL)
    while code == signal.SIGKILL:
        moment += 1
        _, code = os.waitpid(child(save_until(moment)), 0)
        seen.append(restored()[1])
        assert seen[-1] in (seen[-2], seen[-2] + 1)
    print(seen)
    assert moment > 12 and seen[-1] == seen[-2] + 1
    print("ok")


def test_a_file_that_was_put_there_is_not_read(tmp_path: Path) -> None:
    path = Training(ALONE).steps(1).save(tmp_path, 1)
    shutil.copy(path / "rank-00000.safetensors", path / "shards" / "more.safetensors")
    with pytest.raises(UserError, match=r"more.safetensors: is not of this checkpoint"):
        restore(path, *Training(ALONE).parts())


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    end_rank(0)
