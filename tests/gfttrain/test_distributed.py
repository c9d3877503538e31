"""What runs on ranks is below, in functions that `launch` starts as `python test_distributed.py NAME`."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from gftdata.errors import UserError
from gfttrain import distributed
from gfttrain.distributed import (
    OtherRankError,
    World,
    agree,
    alone,
    any_over,
    barrier,
    end_rank,
    first_does,
    gather_json,
    join,
    launch,
    leave,
    stop_on_signals,
    sum_gradients,
    sum_over,
    together,
)

CPU = torch.device("cpu")
JOB = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in JOB:
        monkeypatch.delenv(key, raising=False)


def on_ranks(name: str, *args: str, count: int = 2) -> int:
    return launch(count, [sys.executable, __file__, name, *args])


def python(program: str, *args: object) -> list[str]:
    return [sys.executable, "-c", program, *map(str, args)]


def test_alone() -> None:
    world = join("cpu")
    assert world == alone(CPU) == World(0, 0, 1, CPU)
    tensor = torch.arange(3)
    assert sum_over(world, tensor) is tensor and tensor.tolist() == [0, 1, 2]
    assert any_over(world, True) is True and any_over(world, False) is False
    assert gather_json(world, {"a": 1}) == [{"a": 1}]
    barrier(world)
    agree(world, None)
    with pytest.raises(UserError, match="mine"), together(world):
        raise UserError("mine")
    with pytest.raises(ZeroDivisionError):
        first_does(world, lambda: print(1 / 0))
    leave(world)


def test_two_ranks(capfd: pytest.CaptureFixture[str]) -> None:
    assert on_ranks("reductions") == 0
    out, err = capfd.readouterr()
    assert sorted(out.split()) == ["ok0", "ok1"] and err == ""


def test_a_slurm_step(capfd: pytest.CaptureFixture[str]) -> None:
    environment = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "1"}
    environment |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    tasks = [
        subprocess.Popen(
            [sys.executable, __file__, "reductions"],
            env={**os.environ, **environment, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(2)
    ]
    assert [task.wait() for task in tasks] == [0, 0]
    assert sorted(capfd.readouterr().out.split()) == ["ok0", "ok1"]


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node7", "node7"),
        ("node[003-005,9],other", "node003"),
        ("node[8,10-12]", "node8"),
        ("a-b1,a-b2", "a-b1"),
        ("rack[1-2]node[3-4]-ib", "rack1node3-ib"),
    ],
)
def test_the_first_host_of_a_slurm_step(nodes: str, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NODELIST", nodes)
    monkeypatch.setenv("SLURM_JOB_ID", "123456")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    address = distributed._slurm_address()
    assert address.startswith(f"tcp://{host}:") and address == distributed._slurm_address()
    monkeypatch.setenv("SLURM_STEP_ID", "1")
    assert distributed._slurm_address() != address
    monkeypatch.setenv("MASTER_ADDR", "elsewhere")
    monkeypatch.setenv("MASTER_PORT", "1234")
    assert distributed._slurm_address() == "tcp://elsewhere:1234"


def test_a_first_node_without_an_address_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {
        "STEP_NUM_TASKS": "2",
        "PROCID": "1",
        "LOCALID": "0",
        "STEP_NODELIST": "no-such.invalid",
    }.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    with pytest.raises(UserError, match=r"rank 1: the name no-such\.invalid of the job's first node.*set MASTER_ADDR"):
        join("cpu")


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {
        "RANK": 1,
        "WORLD_SIZE": 2,
        "LOCAL_RANK": 1,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": 9,
    }.items():
        monkeypatch.setenv(key, str(value))
    with pytest.raises(UserError, match=r"rank 1 of 2 did not reach the others within 1 s: .*MASTER_ADDR") as error:
        join("cpu", timedelta(seconds=1))
    assert "\n" not in str(error.value)


def test_devices_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    device = distributed._device_of_rank
    with pytest.raises(UserError, match="several ranks run on"):
        device("cuda:1", 0, 2, bound_by_slurm=False)
    assert device("cpu", 1, 2, bound_by_slurm=False) == CPU
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert device("auto", 3, 4, bound_by_slurm=False) == torch.device("cuda:3") and chosen == [3]
    with pytest.raises(UserError, match="5 ranks on a machine of 4 GPUs"):
        device("cuda", 0, 5, bound_by_slurm=False)  # said by every rank, so that none waits
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert device("cuda", 3, 4, bound_by_slurm=True) == torch.device("cuda:0")


SLEEP = "import time; time.sleep(60)"
BY_RANK = "import os, sys, time; rank = int(os.environ['RANK']); {}"


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("pass", 0),
        ("sys.exit(75)", 75),
        ("time.sleep(rank); sys.exit(75)", 75),
        ("sys.exit(2)", 2),
        ("sys.exit([2, 75][rank])", 2),
        ("sys.exit([75, 3][rank])", 1),
        ("sys.exit([75, 0][rank])", 75),
        ("sys.exit(130)", 130),
        ("sys.exit(1)", 1),
        ("rank or sys.exit(1); time.sleep(60)", 1),
        ("rank or sys.exit(2); time.sleep(60)", 2),
        ("rank or sys.exit(75); time.sleep(60)", 1),
        ("rank or os.kill(os.getpid(), 9)", 1),
    ],
)
def test_exit_codes(
    program: str, code: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distributed, "GRACE_S", 1.5)
    monkeypatch.setattr(distributed, "GRACE_SAVING_S", 1.5)
    began = time.monotonic()
    assert launch(2, python(BY_RANK.format(program))) == code
    assert time.monotonic() - began < 30
    expected = ""
    if "sleep(60)" in program:
        expected = "rank 1 hung after another had ended\n"
    if "kill" in program:
        expected = "rank 0 was ended by SIGKILL\n"
    assert capfd.readouterr() == ("", expected)


SAVES_SLOWLY = """
import os, pathlib, signal, sys, time
ready, saved = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
def save(number, frame):
    time.sleep(1.5)
    saved.with_suffix("." + os.environ["RANK"]).write_text(signal.Signals(number).name)
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, save)
ready.with_suffix("." + os.environ["RANK"]).touch()
time.sleep(60)
"""


def when(condition: Callable[[], bool], action: Callable[[], None]) -> threading.Thread:
    def watch() -> None:
        while not condition():
            time.sleep(0.01)
        action()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def marks(path: Path) -> list[str]:
    return [mark.read_text() for mark in sorted(path.parent.glob(f"{path.stem}.?"))]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_ranks_are_given_the_time_to_save(number: signal.Signals, tmp_path: Path) -> None:
    ready, saved = tmp_path / "ready.x", tmp_path / "saved.x"
    thread = when(lambda: len(marks(ready)) == 2, lambda: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    assert launch(2, python(SAVES_SLOWLY, ready, saved)) == 75
    thread.join()
    assert marks(saved) == [number.name] * 2
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_ends_ranks_that_hang(tmp_path: Path) -> None:
    ready = tmp_path / "ready.x"
    program = SAVES_SLOWLY.replace("(signal.SIGTERM, signal.SIGUSR1)", "(signal.SIGINT,)").replace(
        "sleep(1.5)", "sleep(60)"
    )

    def interrupt() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)

    thread = when(lambda: len(marks(ready)) == 2, interrupt)
    assert launch(2, python(program, ready, tmp_path / "saved.x")) == 130
    thread.join()
    assert marks(tmp_path / "saved.x") == []


def test_ranks_end_with_their_launcher() -> None:
    command = [sys.executable, __file__, "launcher"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        assert [launcher.stdout.readline() for _ in range(2)] == ["waiting\n"] * 2
        launcher.kill()
        began = time.monotonic()
        assert launcher.stdout.read() == ""  # ends when the last rank has
        assert time.monotonic() - began < 20


ENDING = "import atexit; from gfttrain.distributed import end_rank; atexit.register(print, 'late'); print('done')"


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
@pytest.mark.parametrize(("ranks", "printed", "code"), [("2", "done\n", 75), ("1", "done\nlate\n", 0)])
def test_a_rank_of_several_ends_without_taking_the_interpreter_down(
    variable: str, ranks: str, printed: str, code: int
) -> None:
    environment = {**os.environ, variable: ranks}
    ended = subprocess.run(python(f"{ENDING}; end_rank(75)"), env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, printed, "")


def test_alone_nothing_ends() -> None:
    end_rank(75)


def test_stop_on_signals() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        with stop_on_signals() as requested:
            assert not requested()
            os.kill(os.getpid(), number)
            assert requested()
            os.kill(os.getpid(), number)
            assert requested()
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before


def test_stop_on_signals_outside_the_main_thread() -> None:
    answers: list[bool] = []

    def work() -> None:
        with stop_on_signals() as requested:
            answers.append(requested())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers == [False]


class Block(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = torch.nn.LayerNorm(width), torch.nn.Linear(width, width)

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        return hidden_BTD + torch.tanh(self.linear(self.norm(hidden_BTD)))


class TinyModel(torch.nn.Module):
    """Tied embeddings; sizes that two ranks cannot share evenly; returns the sum of weighted losses."""

    def __init__(self, vocab: int = 7, width: int = 5) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab, width)
        self.blocks = torch.nn.ModuleList(Block(width) for _ in range(2))
        self.head = torch.nn.Linear(width, vocab, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids_BT: torch.Tensor, weights_BT: torch.Tensor) -> torch.Tensor:
        hidden_BTD = self.embedding(ids_BT)
        for block in self.blocks:
            hidden_BTD = block(hidden_BTD)
        logprobs_BTV = torch.log_softmax(self.head(hidden_BTD).to(weights_BT.dtype), -1)
        return -(logprobs_BTV.gather(-1, ids_BT.roll(-1, 1)[..., None])[..., 0] * weights_BT).sum()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {n: (g.full_tensor() if isinstance(g, DTensor) else g).double().clone() for n, g in grads.items()}


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - grad).norm() / grad.norm()) for name, grad in expected.items())


def test_gradients_of_2_ranks_equal_those_of_1(capfd: pytest.CaptureFixture[str]) -> None:
    assert on_ranks("compare_gradients") == 0
    assert capfd.readouterr().err == ""


def compare_gradients() -> None:
    world = join("cpu")
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(0, 7, (6, 4), generator=generator)
    mine = slice(world.rank * 3, world.rank * 3 + 3)
    for dtype, mixed, tolerance in [
        (torch.float64, False, 1e-12),
        (torch.float32, False, 1e-5),
        (torch.float32, True, 5e-2),  # bfloat16 compute, float32 masters and reduction
    ]:
        weights_BT = torch.randn(6, 4, generator=generator).to(dtype)
        torch.manual_seed(0)
        model = TinyModel().to(dtype)
        model(ids_BT, weights_BT).backward()
        expected = gradients(model)
        expected_norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        clipped = gradients(model)

        torch.manual_seed(0)
        model = TinyModel().to(dtype)
        policy = MixedPrecisionPolicy(torch.bfloat16 if mixed else None, torch.float32 if mixed else None)
        for block in model.blocks:
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        sum_gradients(model)
        for reduce_once in (False, True):
            model.zero_grad()
            for row in range(mine.start, mine.stop):
                if reduce_once:
                    model.set_requires_gradient_sync(row == mine.stop - 1)
                model(ids_BT[row : row + 1], weights_BT[row : row + 1]).backward()
                grad = model.embedding.weight.grad
                assert (grad is None) == (reduce_once and row < mine.stop - 1)
            assert distance(gradients(model), expected) < tolerance, (dtype, mixed, reduce_once)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            assert isinstance(norm, DTensor)
            assert float(norm.full_tensor()) == pytest.approx(expected_norm, rel=tolerance)
            assert distance(gradients(model), clipped) < tolerance
    leave(world)


def reductions() -> None:
    world = join("cpu")
    rank = world.rank
    assert world == World(rank, rank, 2, CPU)
    assert sum_over(world, torch.tensor([1.0, rank])).tolist() == [2, 1]
    assert any_over(world, rank == 1) is True and any_over(world, False) is False
    assert gather_json(world, ["é" * rank, None, 0.1]) == [["", None, 0.1], ["é", None, 0.1]]
    assert gather_json(world, None) == [None, None]
    barrier(world)

    def error_of(on_rank: int, error: Exception) -> Exception:
        with pytest.raises(Exception) as raised, together(world):
            if rank == on_rank:
                raise error
        return raised.value

    for on_rank in range(2):
        found = error_of(on_rank, UserError("no: expected 1"))
        assert str(found) == "no: expected 1" and type(found) is (UserError if rank == on_rank else OtherRankError)
    assert str(error_of(rank, UserError(f"of rank {rank}"))) == "of rank 0"
    found = error_of(1, ValueError("a bug"))
    assert type(found) is (ValueError if rank == 1 else OtherRankError)
    assert "rank 1: ValueError('a bug')" in str(found) or rank == 1

    def write() -> None:
        raise UserError("disk full")

    with pytest.raises(UserError, match="disk full"):
        first_does(world, write)
    did: list[int] = []
    first_does(world, lambda: did.append(1))
    assert did == [1] * (rank == 0)
    os.write(1, f"ok{rank}\n".encode())  # in one piece, the ranks share the stream
    leave(world)


def launcher() -> None:
    launch(2, [sys.executable, __file__, "wait"])


def wait() -> None:
    join("cpu")
    os.write(1, b"waiting\n")
    time.sleep(60)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    end_rank(0)
