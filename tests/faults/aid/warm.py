"""A process that has everything imported and forks a child for each `gft` command: a case costs what its work costs.

    LD_PRELOAD=FAULTS_SO python warm.py FAULTS_SO MODEL    (orders as JSON lines; process ids and exit codes)

An order is what `injector.Warm.gft` sends. A fork copies no lock that another thread holds: torch computes with one
thread, and rewards are judged here and not in processes of their own, which other tests kill.
"""

import contextlib
import ctypes
import importlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from random import Random
from typing import Any


@contextlib.contextmanager
def judges_here(config: Any) -> Iterator[Any]:
    from gftdata.rewards import judge

    def submit(prompt: Any, text: str) -> Any:
        future: Any = Future()
        future.set_result(judge(config.name, prompt, text))
        return future

    yield submit


def prepare(model: str) -> None:
    """Import what commands import, and let transformers make once what it keeps."""
    import datasets  # noqa: F401
    import torch
    import transformers

    torch.set_num_threads(1)
    import gftdata.derive
    import gftdata.exports
    import gftdata.generate
    import gftdata.imports
    import gftdata.pull
    import gftdata.push
    import gftdata.regroup
    import gfttrain.evaluate
    import gfttrain.train

    transformers.utils.logging.disable_progress_bar()  # which leaves a thread
    transformers.AutoModelForCausalLM.from_pretrained(model)
    gftdata.generate.open_judges = judges_here  # type: ignore[assignment]
    gftdata.derive.open_judges = judges_here  # type: ignore[assignment]
    gfttrain.evaluate.open_judges = judges_here  # type: ignore[assignment]


class Entry:
    """What os.scandir gives, of a name that may not be there any more."""

    def __init__(self, folder: str, name: str) -> None:
        self.name, self.path = name, os.path.join(folder, name)  # noqa: PTH118

    def __fspath__(self) -> str:
        return self.path

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        return Path(self.path).is_dir()

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        return Path(self.path).is_file()

    def is_symlink(self) -> bool:
        return False


def lag(seed: int, views: dict[str, list[str]]) -> None:
    """Listings that are, now and then, those of a while ago, as of a shared file system: `views` are the oldest."""
    rng, seen = Random(seed), dict(views)
    listdir, scandir = os.listdir, os.scandir

    def names(folder: Any = ".") -> list[str]:
        if isinstance(folder, int):
            return listdir(folder)
        key = str(Path(folder).absolute())
        if key not in seen or rng.random() < 0.5:
            seen[key] = listdir(folder)
        return list(seen[key])

    @contextlib.contextmanager
    def entries(folder: Any = ".") -> Any:
        if isinstance(folder, int):
            with scandir(folder) as found:
                yield found
        else:
            yield iter([Entry(os.fspath(folder), name) for name in names(folder)])

    os.listdir, os.scandir = names, entries  # type: ignore[assignment]


def child(library: Any, order: dict[str, Any]) -> int:
    """Runs in the fork: the command, as from a shell."""
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    sys.argv = ["gft", *order["arguments"]]
    time.sleep = lambda seconds: None  # clients wait longer after each failure
    from gftcli.main import main

    for module, constant, value in order["constants"]:
        setattr(importlib.import_module(module), constant, value)
    if order["lag"]:
        lag(**order["lag"])
    if fault := order["fault"]:
        library.fault_arm(
            fault["below"].encode(),
            ctypes.c_long(fault["nth"]),
            fault["how"],
            fault["error"],
            fault["kinds"],
            fault["log"].encode(),
        )
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def main() -> None:
    library = ctypes.CDLL(sys.argv[1])
    prepare(sys.argv[2])
    for thread in threading.enumerate():  # those that have loaded the model
        if thread is not threading.main_thread():
            thread.join(60)
    if threading.active_count() > 1:
        sys.exit(f"not alone: {threading.enumerate()}")
    print("ready", flush=True)
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            code = 1
            try:
                code = child(library, json.loads(line))
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(OSError):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
