"""The ranks of a job: joining it, the device of each, reductions, errors that all share; starting ranks; signals.

What is sharded is model.py's, what is saved is checkpoint.py's. Objects travel between ranks as JSON, never as pickle.
Functions that take a `World` are collective: every rank calls them, in the same order. Alone they cost nothing.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from gftdata.engines.hf import pick_device
from gftdata.errors import OtherRankError, UserError, first_line

TIMEOUT = timedelta(minutes=30)  # of the rendezvous and of every collective: rank 0 may be saving or exporting
MISTAKE, SAVED, INTERRUPTED = 2, 75, 130  # exit codes: UserError, saved after a signal (EX_TEMPFAIL), Ctrl-C
GRACE_S, GRACE_SAVING_S = 30.0, 600.0  # what the other ranks get to end by themselves when one has ended, not with 0
IN_SLURM_STEP = "SLURM_STEP_NUM_TASKS"  # srun has started this process; SLURM_NTASKS is in a batch script's too
LAUNCHER = "GFT_LAUNCHER"  # a pipe's descriptor, whose other end is closed when the launcher is gone


@dataclass(frozen=True, slots=True)
class World:
    """The ranks of a job, seen from one of them."""

    rank: int
    local_rank: int  # among the ranks of this machine
    size: int
    device: torch.device


def alone(device: torch.device) -> World:
    """A job of one process."""
    return World(0, 0, 1, device)


def is_first() -> bool:
    """Whether this process is rank 0, or alone: the one that talks. From the environment, before `join`."""
    env = os.environ
    return env.get("RANK", env["SLURM_PROCID"] if IN_SLURM_STEP in env else "0") == "0"


def join(device_name: str, timeout: timedelta = TIMEOUT) -> World:
    """Become a rank of the job that the environment describes: that of torchrun or `launch`, else of a Slurm step of
    several tasks, else alone. Several ranks run on CUDA (NCCL), one GPU each, or on the CPU (gloo).

    Raises UserError where there is no GPU for every rank, or where the others do not answer in time.
    """
    env = os.environ
    if LAUNCHER in env:
        # not for this process's own children, which do not have the pipe
        threading.Thread(target=_end_with_launcher, args=(int(env.pop(LAUNCHER)),), daemon=True).start()
    torchrun = {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= env.keys()
    if torchrun:
        rank, size, local_rank = (int(env[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    elif IN_SLURM_STEP in env:
        rank, size, local_rank = (int(env[f"SLURM_{key}"]) for key in ("PROCID", "STEP_NUM_TASKS", "LOCALID"))
    else:
        rank, size, local_rank = 0, 1, 0
    if size == 1:
        return alone(pick_device(device_name))
    num_local = int(env.get("LOCAL_WORLD_SIZE", local_rank + 1)) if torchrun else local_rank + 1
    device = _device_of_rank(device_name, local_rank, num_local, bound_by_slurm=not torchrun)
    on_gpu = device.type == "cuda"
    address = "env://" if torchrun else _slurm_address()
    if not torchrun:
        _check_known(address, rank)
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=address,
            rank=rank,
            world_size=size,
            timeout=timeout,
            device_id=device if on_gpu else None,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"rank {rank} of {size} did not reach the others within {timeout.total_seconds():.0f} s: see whether all "
            "were started, and whether MASTER_ADDR and MASTER_PORT are right and reachable from every machine "
            f"({first_line(error)})"
        ) from None
    return World(rank, local_rank, size, device)


def leave(world: World) -> None:
    """Take leave of the other ranks."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def end_rank(code: int) -> None:
    """End this process at once, if it is one rank of several; alone it does nothing.

    gloo's threads live on after the group is destroyed. One that wants the interpreter while that is being taken down
    aborts the process: a rank whose work was done and saved ended with SIGABRT, once in some dozens of runs.
    """
    if int(os.environ.get("WORLD_SIZE", os.environ.get(IN_SLURM_STEP, "1"))) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _slurm_address() -> str:
    """Where rank 0 listens: on the first host of the step (`node[003-005,9]` -> node003)."""
    env = os.environ
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "localhost"
    host = re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodes).split(",")[0]
    # below the ports that systems give out (32768), and another one for every step of every job
    port = 10000 + (int(env.get("SLURM_JOB_ID", "0")) * 7 + int(env.get("SLURM_STEP_ID", "0"))) % 20000
    return f"tcp://{env.get('MASTER_ADDR', host)}:{env.get('MASTER_PORT', port)}"


def _check_known(address: str, rank: int) -> None:
    """Raise UserError where the address's host has none: torch would go on asking until the timeout."""
    host = address.removeprefix("tcp://").rpartition(":")[0]
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        raise UserError(
            f"rank {rank}: the name {host} of the job's first node, where rank 0 listens, has no address here; set "
            "MASTER_ADDR to one that all nodes know (the batch script runs on that node: `export "
            "MASTER_ADDR=$(hostname -f)`)"
        ) from None


def _device_of_rank(name: str, local_rank: int, num_local: int, *, bound_by_slurm: bool) -> torch.device:
    if name not in ("auto", "cuda", "cpu"):
        raise UserError(f"device {name}: several ranks run on `cuda`, one GPU each, or on `cpu`; name one of these")
    if name == "cpu" or not torch.cuda.is_available():
        return pick_device("cpu" if name == "auto" else name)
    num_gpus = torch.cuda.device_count()
    if bound_by_slurm and num_gpus == 1:  # --gpus-per-task shows each task its own; NCCL refuses ranks that share one
        local_rank = 0
    elif num_local > num_gpus:
        raise UserError(
            f"{num_local} ranks on a machine of {num_gpus} GPUs: start one rank for each, or use device cpu"
        )
    torch.cuda.set_device(local_rank)  # before anything is allocated, or each rank has a context on the first GPU
    return torch.device("cuda", local_rank)


def sum_over(world: World, tensor: torch.Tensor) -> torch.Tensor:
    """The sum over ranks, in place."""
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor


def any_over(world: World, flag: bool) -> bool:
    """Whether the flag is up on any rank."""
    return sum_over(world, torch.tensor(int(flag), device=world.device)).item() > 0 if world.size > 1 else flag


def gather_json(world: World, value: Any) -> list[Any]:
    """What each rank has, in the order of ranks, on all of them. JSON types only."""
    if world.size == 1:
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(world.device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=world.device) for _ in range(world.size)]
    dist.all_gather(lengths, torch.tensor([len(text)], device=world.device))
    padded = text.new_zeros(int(torch.cat(lengths).max()))
    padded[: len(text)] = text
    texts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(texts, padded)
    return [json.loads(bytes(part[: int(n)].cpu().numpy())) for part, n in zip(texts, lengths, strict=True)]


def barrier(world: World) -> None:
    """Wait until all ranks are here."""
    if world.size > 1:
        dist.barrier()


def agree(world: World, error: Exception | None) -> None:
    """Go on only when no rank has an error. Else the first that has one raises it, the others OtherRankError with the
    same text; an error that is no UserError is raised wherever it happened, so that its traceback is seen.
    """
    mistake = error is None or isinstance(error, UserError)
    texts = gather_json(world, None if error is None else str(error) if mistake else f"rank {world.rank}: {error!r}")
    first = next((rank for rank, text in enumerate(texts) if text is not None), None)
    if error is not None and (first == world.rank or not mistake):
        raise error
    if first is not None:
        raise OtherRankError(texts[first])


@contextmanager
def together(world: World) -> Iterator[None]:
    """A block that all ranks leave well or none (see `agree`), so that none waits for one that is gone.

    A collective inside must be one that fails on all ranks or on none.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    agree(world, error)


def first_does(world: World, function: Callable[[], None]) -> None:
    """Rank 0 does it while the others wait; its error is raised on all."""
    with together(world):
        if world.rank == 0:
            function()


def sum_gradients(model: torch.nn.Module) -> None:
    """Make every FSDP2 module in `model` sum its gradients over ranks; by default it averages them.

    It takes both settings: in float32 and bfloat16 a divide factor alone becomes an operation that gloo lacks.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def reshard(model: torch.nn.Module) -> None:
    """Let every parameter be its rank's share: a forward pass without a backward one leaves the root's whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Within it SIGTERM and SIGUSR1 (Slurm's --signal) end nothing: the yielded function says whether one has come.

    Ask it once a step and combine the answers with `any_over`. Outside the main thread, which alone receives signals,
    it is never true.
    """
    received: list[int] = []  # a handler may interrupt itself: appending is atomic, an Event's lock would hang
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {n: signal.signal(n, lambda number, _: received.append(number)) for n in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def launch(nproc: int, command: Sequence[str]) -> int:
    """Run `nproc` ranks of `command` on this machine; called in the main thread. Returns an exit code: 0, 2 (a rank
    ended with a UserError), 75 (all saved after a signal), 130 (Ctrl-C), else 1.

    SIGTERM, SIGINT and SIGUSR1 are passed on, and the ranks take the time they need; a second SIGINT kills them. When a
    rank fails, the others have 30 s to end by themselves before they are killed: they may wait for it forever.

    Not torch's elastic agent, though the environment of the ranks is that of torchrun: after a signal the agent drops
    their exit codes, so that a save that failed would look like one that did not; after the first rank that has saved
    it gives the others 30 s, unconditionally; and it prints a page about every error.
    """
    # the launcher holds the store of the rendezvous, so no port can be lost between choosing and opening it
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    reading, writing = os.pipe()
    shared = {"WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0, LAUNCHER: reading}
    env = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // nproc)), **os.environ}
    received: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers}
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(nproc):
            own = {key: str(value) for key, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
            # a session of their own: Ctrl-C in a terminal reaches them once, through the launcher
            process = subprocess.Popen(
                command, env=env | own, stdin=subprocess.DEVNULL, pass_fds=(reading,), start_new_session=True
            )
            ranks.append(process)
        return _supervise(ranks, received)
    finally:
        for process in ranks:
            process.kill()  # nothing, for one that has ended
            process.wait()
        os.close(reading)
        os.close(writing)
        for number, handler in before.items():
            signal.signal(number, handler)


def _supervise(ranks: Sequence[subprocess.Popen[bytes]], received: list[int]) -> int:
    passed_on, patience, since = 0, GRACE_S, float("inf")
    while None in (codes := [rank.poll() for rank in ranks]) and time.monotonic() < since + patience:
        for number in received[passed_on:]:
            passed_on += 1
            if received[:passed_on].count(signal.SIGINT) == 2:
                return INTERRUPTED
            for rank in ranks:
                rank.send_signal(number)
        if failed := {code for code in codes if code}:
            since = min(since, time.monotonic())
            patience = GRACE_SAVING_S if failed == {SAVED} else GRACE_S
        time.sleep(0.05)
    for number, code in enumerate(codes):
        if code is None or code < 0:
            how = "hung after another had ended" if code is None else f"was ended by {signal.Signals(-code).name}"
            print(f"rank {number} {how}", file=sys.stderr)
    kinds = set(codes) - {0}
    if MISTAKE in kinds and kinds <= {MISTAKE, SAVED, None}:
        return MISTAKE
    return next((code for code in (SAVED, INTERRUPTED) if kinds == {code}), 1) if kinds else 0


def _end_with_launcher(descriptor: int) -> None:
    """Without it, a launcher that is killed and started again would find its ranks still writing."""
    os.read(descriptor, 1)
    os.kill(os.getpid(), signal.SIGKILL)
