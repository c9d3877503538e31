"""The pool: whatever a reward does, its future ends in a verdict, and the others' are not disturbed."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import CancelledError, Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pebble.pool.process
import pytest

from gftdata.errors import UserError
from gftdata.judging import default_workers, judge_pool
from gftdata.types import Message, Prompt, Verdict

RIGHT = Verdict(1.0, "ok")
WRONG = Verdict(0.0, "ok")
DIED = Verdict(None, "error:worker_died")
ROOT = Path(__file__).parents[2]

USER_MODULE = """
import os, signal, sys, threading, time
from gftdata.types import Verdict

def reward(prompt, text):
    kind, _, rest = text.partition(" ")
    if kind == "ok":
        return 1.0
    if kind == "spin":
        while True:
            pass
    if kind == "c_call":  # holds the interpreter for minutes
        return len(str(7 ** (10 ** int(rest or 9))))
    if kind == "sleep":
        time.sleep(float(rest))
        return 1.0
    if kind == "allocate":
        hoard = []
        while True:
            hoard.append(bytearray(10**7))
    if kind == "recurse":
        return reward(prompt, text)
    if kind == "raise":
        raise LookupError("mine")
    if kind == "timeout":
        raise TimeoutError("mine")
    if kind == "exit":
        os._exit(int(rest))
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "die_idle":
        threading.Timer(0.3, os._exit, (3,)).start()
        return 1.0
    if kind == "torch":
        return float("torch" in sys.modules)
    if kind == "pid":
        return float(os.getpid())
    if kind == "unpicklable":
        return lambda: None
"""


def prompt(ground_truth: str | None = None) -> Prompt:
    return Prompt("id", None, (Message("user", "How many?"),), ground_truth, "test", (), "{}", "How many?")


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    module = f"pool_rewards_{tmp_path.name}"
    (tmp_path / f"{module}.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return f"{module}:reward"


def verdict_of(future: Future[Verdict]) -> Verdict:
    return future.result(timeout=120)


def is_running(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def test_every_kind_of_misbehaviour(name: str) -> None:
    expected = {
        "raise": Verdict(None, "error:LookupError"),
        "timeout": Verdict(None, "error:TimeoutError"),
        "recurse": Verdict(None, "error:RecursionError"),
        "allocate": Verdict(None, "error:MemoryError"),
        "unpicklable": Verdict(None, "error:bad_return_type"),
        "exit 1": DIED,
        "kill": DIED,
        "torch": WRONG,
        "nothing known": Verdict(None, "error:none"),
        "ok " + "x" * 10**6: RIGHT,
        "ok \ud800": RIGHT,
    }
    with judge_pool(name, timeout_s=60.0, workers=2, memory_gb=0.5) as submit:
        futures = {text: submit(prompt(), text) for text in expected}
        for text, verdict in expected.items():
            assert verdict_of(futures[text]) == verdict, text[:20]
        assert verdict_of(submit(prompt(), "ok")) == RIGHT


@pytest.mark.parametrize("bomb", ["spin", "c_call"])
def test_a_bomb_is_killed_at_its_limit_while_others_finish(name: str, bomb: str) -> None:
    with judge_pool(name, timeout_s=2.0, workers=2, memory_gb=2.0) as submit:
        started = time.monotonic()
        bombed = submit(prompt(), bomb)
        others = [submit(prompt(), "sleep 0.05") for _ in range(20)]
        assert [verdict_of(other) for other in others] == [RIGHT] * 20
        assert verdict_of(bombed) == Verdict(None, "timeout")
        assert 2.0 <= time.monotonic() - started < 10.0
        assert verdict_of(submit(prompt(), "ok")) == RIGHT


def test_bombs_do_not_use_up_the_time_of_others(name: str) -> None:
    with judge_pool(name, timeout_s=1.0, workers=2, memory_gb=2.0) as submit:
        futures = [submit(prompt(), text) for text in ("c_call", "sleep 0.7", "c_call", "sleep 0.7", "sleep 0.7")]
        timeout = Verdict(None, "timeout")
        assert [verdict_of(future) for future in futures] == [timeout, RIGHT, timeout, RIGHT, RIGHT]


def test_the_limit_counts_from_the_start_of_the_judgement(name: str) -> None:
    with judge_pool(name, timeout_s=1.0, workers=1, memory_gb=2.0) as submit:
        futures = [submit(prompt(), "sleep 0.3") for _ in range(8)]
        assert [verdict_of(future) for future in futures] == [RIGHT] * 8


def test_a_worker_that_dies_between_judgements_costs_nothing(name: str) -> None:
    with judge_pool(name, timeout_s=30.0, workers=1, memory_gb=2.0) as submit:
        assert verdict_of(submit(prompt(), "die_idle")) == RIGHT
        time.sleep(1.5)
        assert [verdict_of(submit(prompt(), "ok")) for _ in range(3)] == [RIGHT] * 3


def test_a_pool_that_breaks_over_queued_work_starts_anew(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: object) -> None:
        raise BrokenProcessPool("as if the death came before the word that the task has started")

    with judge_pool(name, timeout_s=30.0, workers=1, memory_gb=2.0) as submit:
        with monkeypatch.context() as patch:
            patch.setattr(pebble.pool.process.PoolManager, "find_expired_task", breaks)
            futures = [submit(prompt(), "ok"), submit(prompt(), "kill")]
            futures += [submit(prompt(), "ok " + "x" * 10**5) for _ in range(20)]
            assert verdict_of(futures[1]) == DIED  # after three attempts
        assert [verdict_of(future) for k, future in enumerate(futures) if k != 1] == [RIGHT] * 21


def test_a_worker_that_leaves_without_an_error_code_is_not_waited_for_forever(name: str) -> None:
    with judge_pool(name, timeout_s=1.0, workers=1, memory_gb=2.0) as submit:
        # pebble takes exit code 0 for a regular end, so only the limit tells
        assert verdict_of(submit(prompt(), "exit 0")).reward is None
        assert verdict_of(submit(prompt(), "ok")) == RIGHT


def test_many_deaths(name: str) -> None:
    with judge_pool(name, timeout_s=30.0, workers=2, memory_gb=2.0) as submit:
        texts = ["exit 3" if k % 4 == 0 else "ok" for k in range(40)]
        futures = [submit(prompt(), text) for text in texts]
        assert [verdict_of(future) for future in futures] == [DIED if text != "ok" else RIGHT for text in texts]


def test_math_in_the_pool() -> None:
    # The limit is shorter than the import of sympy in a fresh worker may be: the import does not count.
    with judge_pool("math", timeout_s=3.0, workers=2, memory_gb=2.0) as submit:
        bomb = submit(prompt("18"), "\\boxed{9^{9^{9^{9}}}}")
        nested = submit(prompt("5"), "\\boxed{" + "(" * 3000 + "5" + ")" * 3000 + "}")
        assert verdict_of(submit(prompt("1/2"), "\\boxed{0.5}")) == RIGHT
        assert verdict_of(submit(prompt("1/2"), "\\boxed{0.6}")) == WRONG
        assert verdict_of(submit(prompt(None), "1")) == Verdict(None, "no_ground_truth")
        for future in (bomb, nested):
            assert verdict_of(future) in (WRONG, Verdict(None, "timeout"), Verdict(None, "error:MemoryError"))
        assert verdict_of(submit(prompt("18"), "\\boxed{18}")) == RIGHT


def test_a_wrong_name_is_refused_before_any_process() -> None:
    with (
        pytest.raises(UserError, match="did you mean 'numeric'"),
        judge_pool("nmeric", timeout_s=1, workers=1, memory_gb=1),
    ):
        raise AssertionError("not reached")
    assert multiprocessing.active_children() == []


def test_a_module_that_only_fails_in_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = f"fails_in_child_{tmp_path.name}"
    (tmp_path / f"{module}.py").write_text(
        "import multiprocessing\nassert multiprocessing.parent_process() is None\ndef reward(p, t): return 1.0\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with (
        pytest.raises(UserError, match="do not start"),
        judge_pool(f"{module}:reward", timeout_s=1, workers=1, memory_gb=1),
    ):
        raise AssertionError("not reached")


def test_leaving_waits_and_then_takes_no_more(name: str) -> None:
    with judge_pool(name, timeout_s=30.0, workers=1, memory_gb=2.0) as submit:
        futures = [submit(prompt(), "sleep 0.2") for _ in range(3)]
        pid = int(verdict_of(submit(prompt(), "pid")).reward or 0)
        last = submit(prompt(), "sleep 0.2")
    assert [future.done() and verdict_of(future) for future in [*futures, last]] == [RIGHT] * 4
    assert not is_running(pid)
    with pytest.raises(RuntimeError, match="closed"):
        submit(prompt(), "ok")


def test_an_exception_stops_the_workers_at_once(name: str) -> None:
    futures: list[Future[Verdict]] = []
    pid = 0
    with (
        pytest.raises(KeyboardInterrupt),
        judge_pool(name, timeout_s=100.0, workers=1, memory_gb=2.0) as submit,
    ):
        pid = int(verdict_of(submit(prompt(), "pid")).reward or 0)
        futures = [submit(prompt(), "spin x" + "x" * 10**5) for _ in range(5)]
        started = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - started < 5.0
    assert not is_running(pid)
    for future in futures:
        with pytest.raises(CancelledError):
            future.result(timeout=0)


@pytest.mark.parametrize("work", ["ok", "spin", "c_call 9"])
def test_no_worker_outlives_a_killed_parent(name: str, work: str, tmp_path: Path) -> None:
    script = f"""
        import time
        from gftdata.judging import judge_pool
        from gftdata.types import Prompt
        if __name__ == "__main__":
            asked = Prompt("id", None, (), None, "test", (), "{{}}", "")
            with judge_pool({name!r}, timeout_s=2.0, workers=1, memory_gb=2.0) as submit:
                print(int(submit(asked, "pid").result().reward), flush=True)
                submit(asked, {work!r})
                time.sleep(100)
    """
    path = tmp_path / "parent.py"
    path.write_text(textwrap.dedent(script))
    with subprocess.Popen(
        [sys.executable, str(path)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(0.5)
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(pid)


def test_default_workers() -> None:
    assert 1 <= default_workers() <= 8
