"""Data sets, models and settings from strangers: refused with the reason, in one line, and nothing of theirs is run.

And the secrets of whoever runs the commands: in no output, whatever goes wrong.
"""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aid.demo_data import make_demo_data

from gftdata.config import validate_config
from gftdata.derive import RejudgeConfig, derive, plan_rejudge
from gftdata.errors import UserError
from gftdata.locations import checked_shards, open_data, verify_data
from gftdata.manifest import parse_manifest
from gftdata.shards import sha256_file
from gftdata.template_trial import check_template
from gftdata.tokens import load_tokenizer
from gfttrain.config import TrainConfig
from gfttrain.prepare import prepare
from gfttrain.stream import ShardReader

ROOT = Path(__file__).parents[2]
DATA_PROMISE = "hostile data sets: refused with the reason"
MODEL_PROMISE = "hostile models and chat templates: refused with the reason, nothing is run"
SECRET_PROMISE = "secrets in the environment: in no output, journal, manifest or traceback"
VOCABULARY = 18


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 groups in one shard."""
    return make_demo_data(tmp_path_factory.mktemp("hostile"), 8)


def refusal(read: Callable[[], object], what: str) -> str | None:
    """What a UserError of one printable line says; None where there is none. Any other exception is a failure."""
    try:
        read()
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 2000, f"{what}: {str(error)[:3000]!r}"
        return str(error)
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    return None


def rebuilt(honest: Path, target: Path, change: Callable[[list[dict[str, Any]]], Any]) -> Path:
    """The data set with other rows, and a manifest to match: whole by its checksums."""
    shutil.copytree(honest, target)
    (path,) = (target / "data").glob("*")
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    write_shard(target, pa.Table.from_pylist(rows, schema=table.schema))
    return target


def write_shard(target: Path, table: pa.Table, **said: Any) -> None:
    (path,) = (target / "data").glob("*")
    pq.write_table(table, path, row_group_size=4 if len(table) < 100 else len(table))
    manifest = manifest_of(target)
    tokens = 0
    if "num_tokens" in table.column_names:
        lists = table["num_tokens"].to_pylist()
        tokens = sum(n for row in lists if row for n in row if isinstance(n, int)) if lists else 0
    found = {"rows": table.num_rows, "response_tokens": max(0, tokens)}
    manifest["shards"][0].update({"sha256": sha256_file(path), "bytes": path.stat().st_size, **found, **said})
    (target / "manifest.json").write_text(json.dumps(manifest))


def set_in(column: str, value: Any, row: int = 1) -> Callable[[list[dict[str, Any]]], None]:
    """Put a value, or what a function makes of the one there, into a column of a row."""

    def change(rows: list[dict[str, Any]]) -> None:
        old = rows[row][column]
        rows[row][column] = value(copy.deepcopy(old)) if callable(value) else value

    return change


def first(value: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda old: [value, *old[1:]]


def deep(value: Any) -> Callable[[list[list[Any]]], list[list[Any]]]:
    return lambda old: [[value, *old[0][1:]], *old[1:]]


ROWS: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "NaN log-prob": set_in("ref_logprobs", deep(float("nan"))),
    "infinite log-prob": set_in("ref_logprobs", deep(float("-inf"))),
    "positive log-prob": set_in("ref_logprobs", deep(0.5)),
    "null log-prob": set_in("ref_logprobs", deep(None)),
    "null log-probs": set_in("ref_logprobs", first(None)),
    "negative id": set_in("response_ids", deep(-1)),
    "id beyond the vocabulary": set_in("response_ids", deep(VOCABULARY)),
    "largest id": set_in("response_ids", deep(2**31 - 1)),
    "null id": set_in("response_ids", deep(None)),
    "null ids": set_in("response_ids", first(None)),
    "empty response": set_in("response_ids", first([])),
    "negative prompt id": set_in("prompt_ids", first(-5)),
    "prompt id beyond the vocabulary": set_in("prompt_ids", first(VOCABULARY)),
    "null prompt id": set_in("prompt_ids", first(None)),
    "no prompt ids": set_in("prompt_ids", []),
    "null prompt": set_in("prompt_ids", None),
    "prompt length": set_in("num_prompt_tokens", lambda n: n + 1),
    "negative prompt length": set_in("num_prompt_tokens", -3),
    "huge prompt length": set_in("num_prompt_tokens", 2**31 - 1),
    "null prompt length": set_in("num_prompt_tokens", None),
    "response length": set_in("num_tokens", lambda old: [old[0] + 1, *old[1:]]),
    "swapped lengths": set_in("num_tokens", lambda old: [old[0] + 1, old[1] - 1, *old[2:]]),
    "negative length": set_in("num_tokens", first(-7)),
    "huge length": set_in("num_tokens", first(2**31 - 1)),
    "zero length": set_in("num_tokens", first(0)),
    "null length": set_in("num_tokens", first(None)),
    "infinite reward": set_in("rewards", first(float("inf"))),
    "NaN reward": set_in("rewards", first(float("nan"))),
    "null source": set_in("sources", first(None)),
    "log-probs shorter": set_in("ref_logprobs", lambda old: [old[0][:-1], *old[1:]]),
    "log-probs longer": set_in("ref_logprobs", lambda old: [[*old[0], -1.0], *old[1:]]),
    **{
        f"{column} shorter": set_in(column, lambda old: old[:-1])
        for column in ("rewards", "sources", "num_tokens", "response_ids", "ref_logprobs")
    },
    **{
        f"{column} null": set_in(column, None)
        for column in ("rewards", "sources", "num_tokens", "response_ids", "ref_logprobs")
    },
}
# what training does not read, and `gft validate` and what decodes rows does
DECODED: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "no messages": set_in("prompt", []),
    "null message": set_in("prompt", [None]),
    "null content": set_in("prompt", [{"role": "user", "content": None}]),
    "null prompt_id": set_in("prompt_id", None),
    "null text": set_in("responses", first(None)),
    "null status": set_in("reward_status", first(None)),
    "status without reward": set_in("reward_status", first("timeout")),
    "null model": set_in("models", first(None)),
    "texts shorter": set_in("responses", lambda old: old[:-1]),
    "NaN behaviour": set_in("behavior_logprobs", lambda old: [old[0], [float("nan")] * len(old[1]), *old[2:]]),
}


def planned_and_read(data: Path, demo: Path) -> None:
    """As `gft train` does, up to the tensors."""
    values = {"model": str(demo / "model"), "data": str(data), "out": str(data / "none"), "device": "cpu"}
    config = validate_config(TrainConfig, {**values, "objective": {"advantage": "one"}}, "test")
    prepared = prepare(config)
    reader = ShardReader(prepared.index, prepared.selection, 8, checked_shards(prepared.shards), VOCABULARY)
    for row_group in range(2):
        reader._row_group(0, row_group)


@pytest.mark.parametrize("name", [*ROWS, *DECODED])
def test_rows_that_no_honest_data_set_has(name: str, honest: Path, tmp_path: Path, demo: Path, tried: Any) -> None:
    tried(DATA_PROMISE, 1)
    data = rebuilt(honest, tmp_path / "data", {**ROWS, **DECODED}[name])
    problems: list[str] = []
    said = refusal(lambda: problems.extend(verify_data(str(data))), name)
    if name not in ("id beyond the vocabulary", "largest id", "prompt id beyond the vocabulary"):  # of no model yet
        assert said or any("train-00000" in line for line in problems), name
    if name in ROWS:
        said = refusal(lambda: planned_and_read(data, demo), name)
        assert said and "train-00000-of-00001.parquet" in said, name
    rejudge = RejudgeConfig.model_validate({"reward": {"name": "exact", "workers": 1}})
    if name in DECODED:
        said = refusal(lambda: derive(plan_rejudge(data, tmp_path / "new", rejudge)), name)
        assert said and str(data) in said, name


def manifest_of(data: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((data / "manifest.json").read_text())
    manifest.pop("checksum", None)  # as whoever lies would
    return manifest


NAMES = [
    "../evil.parquet",
    "../../../../etc/passwd",
    "/etc/passwd",
    "/tmp/evil.parquet",
    "a/b.parquet",
    "..",
    ".",
    "",
    ".hidden.parquet",
    "train.parquet\x00.txt",
    "train\n.parquet",
    "\x1b[2J.parquet",
    "C:\\evil.parquet",
    "train-%2e%2e.parquet",
    "~/x.parquet",
    "x" * 10_000 + ".parquet",
    "train.txt",
    "\u202etrain.parquet",
]
MANIFESTS: list[Callable[[dict[str, Any]], Any]] = [
    *(lambda m, name=name: m["shards"][0].update(name=name) for name in NAMES),
    *(
        lambda m, digest=digest: m["shards"][0].update(sha256=digest)
        for digest in ("", "../../x", "0" * 63, "Z" * 64, None, 7)
    ),
    *(
        lambda m, key=key, value=value: m["shards"][0].update({key: value})
        for key in ("rows", "bytes", "response_tokens")
        for value in (-1, 10**30, "7", 1.5, None, True, [], {}, "9" * 5000)
    ),
    lambda m: m.update(shards=None),
    lambda m: m.update(shards={}),
    lambda m: m.update(shards=[None]),
    lambda m: m.update(shards=[[]]),
    lambda m: m["shards"].append(m["shards"][0]),
    lambda m: m.update(models="all"),
    lambda m: m.update(tokenizer=[]),
    lambda m: m["tokenizer"].update(stop_ids=["a"]),
    lambda m: m.update(format="../gft-groups"),
    lambda m: m.update(schema_version=2),
    lambda m: m.update(schema_version="1"),
    lambda m: m.update(recipe=[1]),
    lambda m: m.update(__class__="x"),
    lambda m: m.update(summary={}),
    lambda m: m.pop("prompts"),
    lambda m: m.clear(),
]
RAW = [
    b"",
    b"{}",
    b"[]",
    b"null",
    b"7",
    b'"x"',
    b"\xff\xfe\x00",
    b"{" * 100_000,
    b"[" * 100_000,
    b'{"format": "gft-groups", "schema_version": 1}',
    b'{"format": "gft-groups", "format": "gft-groups"}',
    b'{"schema_version": NaN}',
    b'{"schema_version": 1e999}',
    b'{"a": ' + b"9" * 10_000 + b"}",
    b"PAR1" * 100,
    pickle.dumps({"format": "gft-groups"}),
]


def test_manifests(honest: Path, tmp_path: Path, tried: Any) -> None:
    tried(DATA_PROMISE, len(MANIFESTS) + len(RAW))
    path = tmp_path / "data/manifest.json"
    shutil.copytree(honest, path.parent)
    for number, change in enumerate(MANIFESTS):
        manifest = manifest_of(honest)
        change(manifest)
        path.write_text(json.dumps(manifest))
        said = refusal(lambda: open_data(str(path.parent)), f"manifest {number}")
        assert said and str(path) in said and said.isprintable(), f"manifest {number}: {said}"
    for content in RAW:
        path.write_bytes(content)
        said = refusal(lambda: open_data(str(path.parent)), str(content[:40]))
        assert said and str(path) in said and said.isprintable(), content[:40]
        with pytest.raises(UserError):
            parse_manifest(content, "x")


def other_types(table: pa.Table) -> list[pa.Table]:
    """The table with each column as something else, without it, twice, and in another order."""
    tables = []
    for number, name in enumerate(table.column_names):
        for values in (pa.nulls(len(table)), pa.array(["x"] * len(table)), pa.array([[1.5]] * len(table))):
            if values.type != table.schema.field(number).type:
                tables.append(table.set_column(number, name, values))
        tables.append(table.drop_columns([name]))
    return [*tables, table.append_column("more", pa.nulls(len(table))), table.select(table.column_names[::-1])]


def test_parquet_files(honest: Path, tmp_path: Path, demo: Path, tried: Any) -> None:
    data = tmp_path / "data"
    shutil.copytree(honest, data)
    (path,) = (data / "data").glob("*")
    table = pq.read_table(path)
    files: list[Callable[[], object]] = [
        *(lambda t=t: write_shard(data, t.replace_schema_metadata(table.schema.metadata)) for t in other_types(table)),
        lambda: write_shard(data, table.replace_schema_metadata(None)),
        lambda: write_shard(data, table.replace_schema_metadata({"gft.schema_version": "2"})),
        lambda: write_shard(data, table.replace_schema_metadata({"gft.schema_version": b"\xff"})),
        lambda: write_shard(data, pa.table({})),
        lambda: write_shard(data, table, rows=7),
        lambda: write_shard(data, table, rows=2**50),
        lambda: write_shard(data, table, response_tokens=1),
        lambda: write_shard(data, many_rows(table)),
        lambda: write_shard(data, no_utf8(table, "prompt_id")),
        lambda: write_shard(data, no_utf8(table, "data_source")),
    ]
    whole = path.read_bytes()
    raw = [b"", b"PAR1", b"PAR1PAR1", b"PAR1" + b"\xff" * 100 + b"\xff\xff\xff\x7fPAR1", whole[:-8] + b"\0" * 8]
    raw += [whole[:-8] + n.to_bytes(4, "little") + b"PAR1" for n in (0, 1, 2**31 - 1, 2**32 - 1)]
    raw += [pickle.dumps({}), b"{}", whole + whole]
    files += [lambda content=content: signed(data, path, content) for content in raw]
    tried(DATA_PROMISE, len(files))
    for number, make in enumerate(files):
        shutil.copy(honest / "manifest.json", data / "manifest.json")
        path.write_bytes(whole)
        make()
        problems = list[str]()
        said = refusal(partial(validated, data, problems), f"file {number}")
        trained = refusal(lambda: planned_and_read(data, demo), f"file {number}")
        for line in filter(None, (said, trained, *problems)):
            assert str(path) in line or str(data) in line, f"file {number}: {line}"
        if number < len(files) - 1:  # after a whole file nobody reads what comes before it
            assert problems or said, f"file {number}"


def validated(data: Path, problems: list[str]) -> None:
    problems += verify_data(str(data))


def signed(data: Path, path: Path, content: bytes) -> None:
    path.write_bytes(content)
    manifest = manifest_of(data)
    manifest["shards"][0].update(sha256=sha256_file(path), bytes=len(content))
    (data / "manifest.json").write_text(json.dumps(manifest))


def many_rows(table: pa.Table) -> pa.Table:
    """Rows of nothing, hundreds of them in a byte."""
    return pa.Table.from_arrays([pa.nulls(2**20, field.type) for field in table.schema], schema=table.schema)


def no_utf8(table: pa.Table, column: str) -> pa.Table:
    values = pa.array([b"\xff\xfe"] * len(table), pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(table), values.buffers())
    return table.set_column(table.column_names.index(column), column, text)


AT_HUB = """
import json, sys
from gftdata.errors import UserError
from gftdata.locations import open_data, read_index, verify_data
for location in sys.argv[1:]:
    try:
        data = open_data(location)
        problems = verify_data(location)
        read_index(data.shards)
    except UserError as error:
        problems = [str(error)]
    print(json.dumps(problems), flush=True)
"""
REMOTE = ("positive log-prob", "negative id", "num_tokens shorter", "huge length", "null source", "infinite reward")


def test_the_same_from_the_hub_and_from_s3(honest: Path, tmp_path: Path, tried: Any) -> None:
    """Through the Hub's own client and s3fs, each against a server on this machine."""
    import s3fs
    from aid.download_hub import DownloadHub
    from moto.server import ThreadedMotoServer

    tried(DATA_PROMISE, 2 * (len(REMOTE) + len(NAMES[:4])))
    sets = tmp_path / "hub/datasets/someone"
    for number, name in enumerate(REMOTE):
        rebuilt(honest, sets / f"rows-{number}", ROWS[name])
    for number, name in enumerate(NAMES[:4]):
        shutil.copytree(honest, sets / f"name-{number}")
        manifest = manifest_of(honest)
        manifest["shards"][0]["name"] = name
        (sets / f"name-{number}/manifest.json").write_text(json.dumps(manifest))
    names = sorted(path.name for path in sets.iterdir())
    hub, server = DownloadHub(tmp_path / "hub"), ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "HF_"))}
    clean |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "GFT_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": str(ROOT),
    }
    try:
        files = s3fs.S3FileSystem(
            key="key", secret="secret", endpoint_url=clean["AWS_ENDPOINT_URL"], skip_instance_cache=True
        )
        files.makedirs("groups", exist_ok=True)
        files.put(str(sets), "groups/someone", recursive=True)
        locations = [f"hf://datasets/someone/{name}" for name in names] + [f"s3://groups/someone/{n}" for n in names]
        command = [sys.executable, "-c", AT_HUB, *locations]
        done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=300)
    finally:
        hub.stop()
        server.stop()
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(locations)
    for location, problems in zip(locations, found, strict=True):
        assert problems and all(location in line and line.isprintable() for line in problems), (location, problems)
    written = [path for path in tmp_path.rglob("*") if "evil" in path.name or path.name == "passwd"]
    assert not written


TEMPLATES = {
    "a loop without end": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a large range": "{% for i in range(10**9) %}{% endfor %}",
    "memory": "{{ 'a' * 10**10 }}",
    "memory by doubling": "{% set ns = namespace(x='a' * 1000) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}"
    "{% endfor %}{{ ns.x }}",
    "a large number": "{{ 9 ** (9 ** 9) }}",
    "much text": "{% for i in range(90000) %}{{ 'a' * 1000 }}{% endfor %}",
    "width": "{{ '%999999999d' | format(1) }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('touch pwned').read() }}",
    "builtins": "{{ raise_exception.__globals__['__builtins__']['open']('pwned', 'w') }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "format map": "{{ '{x.__class__}'.format_map({'x': messages}) }}",
    "attr": "{{ messages | attr('__class__') }}",
    "mutation": "{{ messages.append(1) }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os }}",
    "no template": "{% for",
    "undefined": "{{ nothing.at.all }}",
    "its own error": "{{ raise_exception('no\nfurther\x1b[2J') }}",
    "nothing": "",
}
HARMLESS = ("nothing", "format map", "attr")  # the sandbox gives them nothing


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates(
    name: str, chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tried: Any
) -> None:
    tried(MODEL_PROMISE, 1)
    monkeypatch.setattr("gftdata.template_trial.TRIAL_S", 4.0)
    monkeypatch.chdir(tmp_path)
    check_template.cache_clear()
    model = tmp_path / "model"
    shutil.copytree(chat_model, model)
    (model / "chat_template.jinja").write_text(TEMPLATES[name])
    said = refusal(lambda: load_tokenizer(str(model)), name)
    assert (said is None) == (name in HARMLESS), f"{name}: {said}"
    assert said is None or (str(model) in said and said.isprintable()), said
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_an_honest_template_is_tried_once(chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_template.cache_clear()
    load_tokenizer(str(chat_model))
    monkeypatch.setattr(subprocess, "run", None)
    load_tokenizer(str(chat_model))


class Evil:
    """A pickle of it, unpickled, leaves a file behind."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("pwned"),))


def evil_models() -> dict[str, Callable[[Path], object]]:
    def pickled(name: str) -> Callable[[Path], None]:
        def put(model: Path) -> None:
            (model / "model.safetensors").unlink()
            (model / name).write_bytes(pickle.dumps(Evil()))

        return put

    def config(**more: Any) -> Callable[[Path], None]:
        def put(model: Path) -> None:
            values = json.loads((model / "config.json").read_text())
            (model / "config.json").write_text(json.dumps(values | more))
            (model / "evil.py").write_text("open('pwned', 'w')\nclass Evil: pass\n")

        return put

    def raw(name: str, content: bytes) -> Callable[[Path], object]:
        return lambda model: (model / name).write_bytes(content)

    auto = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    return {
        "pytorch_model.bin": pickled("pytorch_model.bin"),
        "model.pt": pickled("model.pt"),
        "pytorch_model-00001-of-00002.bin": pickled("pytorch_model-00001-of-00002.bin"),
        "remote code": config(model_type="evil", architectures=["Evil"], auto_map=auto),
        "unknown type": config(model_type="../../evil"),
        "type of another kind": config(model_type=["llama"]),
        "no type": config(model_type=None),
        "config of rubbish": raw("config.json", b"\xff\xfe"),
        "config of a list": raw("config.json", b"[]"),
        "config of nesting": raw("config.json", b"[" * 100_000),
        "negative sizes": config(hidden_size=-1),
        "no heads": config(num_attention_heads=0),
        "sizes of text": config(num_hidden_layers="many"),
        "weights of rubbish": raw("model.safetensors", b"\xff" * 1000),
        "weights of nothing": raw("model.safetensors", b""),
        "weights with a header of 2**63 bytes": raw("model.safetensors", b"\xff" * 7 + b"\x7f{}"),
        "weights that are a pickle": raw("model.safetensors", pickle.dumps(Evil())),
        "tokenizer of rubbish": raw("tokenizer.json", b"{}"),
        "tokenizer of nesting": raw("tokenizer.json", b"[" * 100_000),
        "tokenizer settings of rubbish": raw("tokenizer_config.json", b"[1]"),
        "tokenizer with code": raw(
            "tokenizer_config.json",
            json.dumps({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}).encode(),
        ),
        "generation settings of rubbish": raw("generation_config.json", b"[1]"),
    }


@pytest.mark.parametrize("name", evil_models())
def test_models(
    name: str, demo: Path, honest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tried: Any
) -> None:
    """Loaded as training and the embedded engine do: tokenizer, outline, weights."""
    import torch

    from gftdata.engines.hf import load_model
    from gfttrain.model import outline

    tried(MODEL_PROMISE, 1)
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    shutil.copytree(demo / "model", model)
    evil_models()[name](model)

    def load() -> None:
        load_tokenizer(str(model))
        outline(str(model))
        load_model(str(model), torch.float32, torch.device("cpu"))

    said = refusal(load, name)
    assert said and str(model) in said and said.isprintable(), f"{name}: {said}"
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
    pickles = name.endswith((".bin", ".pt"))
    assert not pickles or "pickle" in said
    # also where only the weights are looked at: a teacher's, or one that was put there later
    said = refusal(lambda: load_model(str(model), torch.float32, torch.device("cpu")), name)
    assert said or "tokenizer" in name or "generation" in name, name
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


SECRETS = {
    "HF_TOKEN": "hf_SECRETabcdefghijklmnopqrstuvwxyz01",
    "AWS_ACCESS_KEY_ID": "SECRETKEYID0123456789",
    "AWS_SECRET_ACCESS_KEY": "SECRET/key/abcdefghijklmnop+0123",
    "AWS_SESSION_TOKEN": "SECRETsessiontoken0123456789",
    "FAR_KEY": "sk-SECRET0123456789abcdef",
    "OPENAI_API_KEY": "sk-SECRETopenai0123456789",
    "WANDB_API_KEY": "SECRETwandb0123456789abcdef0123456789abcd",
}


def test_secrets_are_in_no_output(
    honest: Path,
    demo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    tried: Any,
) -> None:
    """Of commands that end well, that fail for the user's reasons, and that fail with a traceback."""
    from gftcli import main as command

    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    prompts = {"path": str(demo / "train.jsonl"), "columns": {"ground_truth": "answer", "expert": "expert"}, "limit": 2}
    far = {"name": "openai", "base_url": "http://127.0.0.1:9/v1", "api_key_env": "FAR_KEY", "give_up_after_s": 0.1}
    settings: dict[str, Any] = {
        "model": str(demo / "model"),
        "out": "made",
        "prompts": prompts,
        "reward": {"name": "numeric", "workers": 1},
        "responses": {"self": {"count": 1}, "max_tokens": 8},
        "engine": {"device": "cpu"},
    }
    teacher = {"name": "far", "model": "m", "count": 1, "engine": far}
    Path("well.yaml").write_text(json.dumps(settings))
    asks = {**settings["responses"], "teachers": [teacher]}
    Path("far.yaml").write_text(json.dumps({**settings, "out": "far", "responses": asks}))
    Path("bug.yaml").write_text(json.dumps({**settings, "out": "bug"}))
    shutil.copytree(honest, "broken")
    (path,) = Path("broken/data").glob("*")
    path.write_bytes(path.read_bytes()[:-1])
    train = {"model": str(demo / "model"), "out": "run", "device": "cpu", "max_steps": 1}
    Path("train.yaml").write_text(json.dumps({**train, "data": "made", "objective": {"advantage": "one"}}))
    Path("broken.yaml").write_text(json.dumps({**train, "out": "run2", "data": "broken"}))
    commands = [
        ["generate", "well.yaml"],
        ["generate", "far.yaml"],
        ["train", "train.yaml"],
        ["train", "broken.yaml"],
        ["train", "train.yaml", "--data", "s3://bucket/path"],
        ["train", "train.yaml", "--data", "hf://datasets/someone/nothing"],
        ["validate", "s3://bucket/path"],
        ["validate", "https://user:sk-SECRET0123456789abcdef@host/x"],
        ["push", "made", "someone/groups", "--license", "mit", "--dry-run"],
        ["status", "made"],
        ["generate", "bug.yaml"],
    ]
    tried(SECRET_PROMISE, len(commands) * len(SECRETS))
    said = []
    for arguments in commands:
        if arguments[-1] == "bug.yaml":
            monkeypatch.setattr("gftdata.generate.finalize", bug)
        monkeypatch.setattr(sys, "argv", ["gft", *arguments])
        try:
            command.main()
        except SystemExit:
            pass
        except Exception as error:
            import traceback

            said += traceback.format_exception(error)
        captured = capfd.readouterr()
        said += [captured.out, captured.err]
    everything = "".join(said) + caplog.text
    assert "Error" in everything and "127.0.0.1" in everything
    for name, value in SECRETS.items():
        written = [p for p in tmp_path.rglob("*") if p.is_file() and value.encode() in p.read_bytes()]
        assert value not in everything, f"{name} was printed"
        assert not written, f"{name} was written to {written}"


def bug(*_: Any) -> None:
    raise RuntimeError("a bug of ours")
