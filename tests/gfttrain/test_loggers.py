"""Each logger for real, offline: what it wrote is read back, over two lives of one run."""

import json
import math
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gftdata.errors import UserError
from gfttrain.loggers import check_loggers, open_loggers

# a run that is killed at step 5, and goes on from its checkpoint of step 3
FIRST_LIFE = [{"step": s, "loss": 1 / s, "data/reward/self": 0.5, "weights": [1, 2], "entropy": None} for s in (1, 2)]
LINES = [*FIRST_LIFE, {"step": 3, "loss": math.nan, "groups": 8}, {"step": 4, "loss": 4.0}, {"step": 5, "loss": 5.0}]
RESUMED = [{"step": s, "loss": s + 0.25} for s in (4, 5, 6)]
CONFIG = {"model": "tiny", "optim": {"lr": 1e-3}}

TWO_LIVES = """
import json, os, sys
from pathlib import Path
from gfttrain.loggers import open_loggers

name, out = sys.argv[1], Path(sys.argv[2])
for first_step, lines in json.loads(sys.argv[3]):
    with open_loggers([name], out, json.loads(sys.argv[4]), first_step=first_step) as log:
        for line in lines:
            log(line)
"""


def two_lives(name: str, out: Path, **variables: str) -> None:
    """Both lives in a process of their own: these packages start threads and servers, and read variables on import."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "TRACKIO_"))}
    closed_door = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    arguments = [name, str(out), json.dumps([[0, LINES], [3, RESUMED]]), json.dumps(CONFIG)]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", TWO_LIVES, *arguments],
        env={**environment, **closed_door, "HOME": str(out.parent / "home"), **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def run_id(out: Path) -> str:
    return str(json.loads((out / "loggers.json").read_text())["run_id"])


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first_step, lines in ((0, LINES), (3, RESUMED)):
        with open_loggers(["tensorboard"], tmp_path, CONFIG, first_step=first_step) as log:
            for line in lines:
                log(line)
            written = EventAccumulator(str(tmp_path / "tensorboard"))
            written.Reload()
            assert written.Scalars("loss")[-1].step == lines[-1]["step"], "a kill here loses nothing"
    assert set(written.Tags()["scalars"]) == {"loss", "data/reward/self", "groups"}
    losses = {event.step: event.value for event in written.Scalars("loss")}
    assert losses == {1: 1.0, 2: 0.5, 4: 4.25, 5: 5.25, 6: 6.25}
    assert [event.value for event in written.Scalars("data/reward/self")] == [0.5, 0.5]
    assert b'"lr": 0.001' in written.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_wandb(tmp_path: Path) -> None:
    out = tmp_path / "my run"
    out.mkdir()
    two_lives("wandb", out, WANDB_MODE="offline")
    assert run_id(out).startswith("my-run-")
    first, second = sorted(out.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    for path in (first, second):
        assert path.stem == f"run-{run_id(out)}"
        (run,) = [record.run for record in wandb_records(path) if record.HasField("run")]
        assert (run.run_id, run.project) == (run_id(out), "gft")
        assert json.loads({c.key: c.value_json for c in run.config.update}["optim"]) == {"lr": 1e-3}
    assert wandb_history(first) == [
        {"_step": 1, "loss": 1.0, "data/reward/self": 0.5},
        {"_step": 2, "loss": 0.5, "data/reward/self": 0.5},
        {"_step": 3, "groups": 8},
        {"_step": 4, "loss": 4.0},
        {"_step": 5, "loss": 5.0},
    ]
    assert wandb_history(second) == [{"_step": line["step"], "loss": line["loss"]} for line in RESUMED]


def wandb_history(path: Path) -> list[dict[str, Any]]:
    """What was logged, a step each."""
    rows = []
    for record in wandb_records(path):
        if record.HasField("history"):
            row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            rows.append({key: value for key, value in row.items() if key not in ("_timestamp", "_runtime")})
    return rows


def wandb_records(path: Path) -> list[Any]:
    """The records of a small .wandb file: LevelDB's log format after 7 bytes, here without blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, records = path.read_bytes(), 7, []
    assert len(content) < 32768
    while place < len(content):
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        assert kind == 1, "a whole record"
        records.append(Record.FromString(content[place + 7 : place + 7 + length]))
        place += 7 + length
    return records


@pytest.mark.parametrize("own_folder", [False, True])
def test_trackio(own_folder: bool, tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    out, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    out.mkdir()
    two_lives("trackio", out, **({"TRACKIO_DIR": str(elsewhere), "TRACKIO_PROJECT": "sums"} if own_folder else {}))
    path = elsewhere / "sums.db" if own_folder else out / "trackio" / "gft.db"
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
        rows = database.execute("select run_name, run_id, step, metrics from metrics order by id").fetchall()
        ((config,),) = database.execute("select config from configs").fetchall()
    database.close()
    assert {row[0] for row in rows} == {run_id(out)}
    assert len({row[1] for row in rows}) == 1, "both lives are one run"
    assert [row[2] for row in rows] == [1, 2, 3, 4, 5, 4, 5, 6]
    expected = [{"loss": 1.0, "data/reward/self": 0.5}, {"loss": 0.5, "data/reward/self": 0.5}, {"groups": 8}]
    assert [json.loads(row[3]) for row in rows[:3]] == expected
    assert [json.loads(row[3])["loss"] for row in rows[3:]] == [4.0, 5.0, 4.25, 5.25, 6.25]
    assert json.loads(config)["optim"] == {"lr": 1e-3}


def test_a_logger_that_dies_costs_the_run_nothing(tmp_path: Path) -> None:
    script = """
import json, sys
from pathlib import Path
import psutil
from gfttrain.loggers import open_loggers

said, out = [], Path(sys.argv[1])
with open_loggers(["wandb", "tensorboard"], out, {}, warn=said.append) as log:
    log({"step": 1, "loss": 0.5})
    children = psutil.Process().children(recursive=True)
    for child in children:
        child.kill()
    psutil.wait_procs(children, timeout=30)
    for step in (2, 3):
        for _ in range(20):  # the first ones may still fit into the socket
            log({"step": step, "loss": 0.5})
print(json.dumps(said))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "WANDB_MODE": "offline", "HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (said,) = json.loads(done.stdout.splitlines()[-1])
    assert said.startswith("wandb failed at step ") and said.endswith("metrics.jsonl has everything")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    written = EventAccumulator(str(tmp_path / "tensorboard"))
    written.Reload()
    assert {event.step for event in written.Scalars("loss")} == {1, 2, 3}, "the other logger goes on"


def test_a_logger_that_cannot_start(tmp_path: Path, one_line: Callable[[BaseException], str]) -> None:
    (tmp_path / "tensorboard").write_text("in the way of its folder")
    with (
        pytest.raises(UserError, match="tensorboard does not start") as error,
        open_loggers(["tensorboard"], tmp_path, {}),
    ):
        pass
    assert "leave tensorboard out of loggers" in one_line(error.value)

    said: list[str] = []
    with open_loggers(["tensorboard"], tmp_path, {}, first_step=3, warn=said.append) as log:
        log({"step": 4, "loss": 0.5})
    assert len(said) == 1 and "tensorboard does not start" in said[0], "a resumed run goes on without"


def test_a_missing_package(
    tmp_path: Path, one_line: Callable[[BaseException], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # what an import finds that must fail
    with pytest.raises(UserError, match="wandb is not installed") as error, open_loggers(["wandb"], tmp_path, {}):
        pass
    assert one_line(error.value).endswith("install it with pip install 'gft-toolkit[wandb]'")
    assert not any(tmp_path.iterdir())


def test_a_folder_of_that_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trackio").mkdir()  # as a run leaves it
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    with pytest.raises(UserError, match="trackio is not installed"):
        check_loggers(["trackio"])


def test_the_error_of_a_run_is_its_own(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="mine"), open_loggers(["tensorboard"], tmp_path, {}):
        raise KeyError("mine")


def test_no_loggers(tmp_path: Path) -> None:
    with open_loggers([], tmp_path, {}) as log:
        log({"step": 1, "loss": 0.5})
    assert not any(tmp_path.iterdir())
