"""Response groups on disk, bytes and reading speed: our shards, JSON Lines, Parquet with a row a response.

    python benchmarks/formats.py                             # 4 synthetic shards and the demo's groups; minutes
    python benchmarks/formats.py --shards 16 --repeats 7

Two data sets. `synthetic` (synthetic.py): groups of 8 responses of 100 to 600 tokens, prompts of 200, random ids and
log-probs, made-up words. `demo`: what `gft generate samples/demo/generate.yaml` makes, 512 sums with 8 short responses
each, a character a token: real text and real log-probs of a tiny model. The same content in each way:

    gft shards           as `gft generate` writes them: a row a group, zstd level 3, byte-stream-split log-probs
    JSON Lines + zstd    an object a group with the same keys, orjson, zstd level 3; floats as short as float32 allows
    row a response       a row a response: `prompt`, `completion`, their ids and log-probs, and all else that a shard
                         says of them, prompt and prompt ids again in each; pyarrow's defaults with zstd level 3
    gft export trl-sft   what TRL's SFTTrainer takes, of all sources and --tokens: input_ids and labels (no log-probs)

Readers give prompt ids, response ids and reference log-probs of everything as numpy arrays (the export has no
log-probs), in one process, in rounds that go through all of them forwards and backwards; files are in the page cache.
The sums of what they gave are compared. `gft train` is index, plan, sha256 checks, shuffling and collating into
tensors: more work than any other line does. `arrow` takes record batches, `rows` Python objects, a row at a time.
"""

import argparse
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from measure import ROOT, alternating, print_end, print_table, spread
from stream import batches_of, import_trainer, plan_epoch
from synthetic import Lengths, make_data

SHARDS, JSONL, ROWS, EXPORT = "gft shards", "JSON Lines + zstd", "row a response", "gft export trl-sft"
LENGTHS = Lengths(prompt=200, shortest=100, longest=600)
HOLD = """\
A shard and a line of JSON hold a whole group: the prompt once; verdict, seed, model, end, token ids, reference and
decode-time log-probs of every response. A row a response holds the same, the prompt as often as it has responses; the
groups have to be put together again by prompt_id. The export holds token ids and which of them are learnt, and no
log-probs: what SFT needs, and what GFT cannot be trained from."""
PER_GROUP = ("prompt_id", "source_id", "prompt", "ground_truth", "data_source", "prompt_ids", "extra")
PER_RESPONSE = {  # a shard's column -> its name in a file with a row a response
    "responses": "completion",
    "sources": "source",
    "rewards": "reward",
    "reward_status": "reward_status",
    "finish_reasons": "finish_reason",
    "models": "model",
    "seeds": "seed",
    "response_ids": "completion_ids",
    "ref_logprobs": "ref_logps",
    "behavior_logprobs": "behavior_logps",
}
Arrays = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]  # prompt ids, response ids, log-probs
Reader = Callable[[Path], Iterator[Arrays]]


# ---- writing


def tables(data: Path) -> Iterator[pa.Table]:
    for path in sorted((data / "data").glob("*.parquet")):
        yield pq.read_table(path)


def write_jsonl(data: Path, out: Path) -> None:
    options = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
    lines = bytearray()
    for table in tables(data):
        for batch in table.to_batches(max_chunksize=64):
            for row in batch.to_pylist():
                for name in ("ref_logprobs", "behavior_logprobs"):
                    # float32, which orjson writes with as few digits as it has
                    row[name] = [None if one is None else np.array(one, np.float32) for one in row[name]]
                lines += orjson.dumps(row, option=options)
    out.write_bytes(pa.Codec("zstd", compression_level=3).compress(bytes(lines), asbytes=True))


def flattened(table: pa.Table) -> pa.Table:
    """A row a response."""
    lengths = np.diff(table["responses"].combine_chunks().offsets.to_numpy())
    group_R = pa.array(np.repeat(np.arange(table.num_rows), lengths))
    columns = {name: table[name].take(group_R) for name in PER_GROUP}
    columns |= {new: table[name].combine_chunks().flatten() for name, new in PER_RESPONSE.items()}
    return pa.table(columns)


def write_rows(data: Path, out: Path) -> None:
    writer = None
    for table in map(flattened, tables(data)):
        writer = writer or pq.ParquetWriter(out, table.schema, compression="zstd", compression_level=3)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def write_export(data: Path, out: Path) -> None:
    from gftdata.exports import export
    from gftdata.layouts import ExportOptions

    export(str(data), "trl-sft", out, ExportOptions(sources=("expert", "self"), tokens=True))


# ---- reading


def arrays(prompts: pa.Array, responses: pa.Array, scores: pa.Array) -> Arrays:
    """Lists of any depth -> their values, without copying."""
    return tuple(deep(column).to_numpy() for column in (prompts, responses, scores))  # type: ignore[return-value]


def deep(column: pa.Array) -> pa.Array:
    while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = column.flatten()
    return column


def read_shards(data: Path) -> Iterator[Arrays]:
    for path in sorted((data / "data").glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            for number in range(file.num_row_groups):
                table = file.read_row_group(number, columns=["prompt_ids", "response_ids", "ref_logprobs"])
                yield arrays(*(table[name].combine_chunks() for name in table.column_names))


def read_trainer(data: Path) -> Iterator[Arrays]:
    """Everything that `gft train` does to a data set but the model. Prompts are part of the packed rows."""
    from gftdata.locations import open_data

    shards = open_data(str(data)).shards
    with batches_of(shards, plan_epoch(shards, advantage="one")) as works:
        for work in works:
            for batch in work:
                nothing = np.empty(0, np.int32)
                yield nothing, batch.target_ids_N.numpy(), batch.ref_logprobs_N.numpy()


def read_jsonl(path: Path) -> Iterator[Arrays]:
    with pa.input_stream(str(path), compression="zstd") as stream, io.BufferedReader(stream) as lines:
        for line in lines:
            row = orjson.loads(line)
            yield (
                np.array(row["prompt_ids"], np.int32),
                np.concatenate([np.array(ids, np.int32) for ids in row["response_ids"]]),
                np.concatenate([np.array(one, np.float32) for one in row["ref_logprobs"]]),
            )


def read_rows(path: Path) -> Iterator[Arrays]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(1024, columns=["prompt_ids", "completion_ids", "ref_logps"]):
            yield arrays(*batch.columns)


def read_export(path: Path) -> Iterator[Arrays]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(1024, columns=["input_ids", "labels"]):
            ids, labels = (deep(column).to_numpy() for column in batch.columns)
            yield np.empty(0, np.int32), ids[labels != -100], np.empty(0, np.float32)


def streamed(files: list[str], columns: list[str]) -> Any:
    from datasets import load_dataset

    return load_dataset("parquet", data_files=files, split="train", streaming=True, columns=columns)


def files_of(path: Path) -> list[str]:
    return [str(path)] if path.is_file() else [str(found) for found in sorted((path / "data").glob("*.parquet"))]


def read_streaming_arrow(path: Path, columns: list[str], batch_size: int) -> Iterator[Arrays]:
    for table in streamed(files_of(path), columns).with_format("arrow").iter(batch_size=batch_size):
        yield arrays(*(table[name].combine_chunks() for name in columns))


def read_streaming_rows(path: Path, columns: list[str]) -> Iterator[Arrays]:
    """As most people read: one Python object after the other."""
    nested = path.is_dir()
    prompts, responses, scores = columns
    for row in streamed(files_of(path), columns):
        ids, logps = (row[responses], row[scores]) if nested else ([row[responses]], [row[scores]])
        yield (
            np.array(row[prompts], np.int32),
            np.concatenate([np.array(one, np.int32) for one in ids]),
            np.concatenate([np.array(one, np.float32) for one in logps]),
        )


OURS, THEIRS = ["prompt_ids", "response_ids", "ref_logprobs"], ["prompt_ids", "completion_ids", "ref_logps"]
READERS: dict[tuple[str, str], Reader] = {  # (format, way to read it)
    (SHARDS, "gft train: checked, shuffled, tensors"): read_trainer,
    (SHARDS, "pyarrow, arrow"): read_shards,
    (SHARDS, "datasets streaming, arrow"): partial(read_streaming_arrow, columns=OURS, batch_size=64),
    (SHARDS, "datasets streaming, rows"): partial(read_streaming_rows, columns=OURS),
    (JSONL, "orjson, rows"): read_jsonl,
    (ROWS, "pyarrow, arrow"): read_rows,
    (ROWS, "datasets streaming, arrow"): partial(read_streaming_arrow, columns=THEIRS, batch_size=512),
    (ROWS, "datasets streaming, rows"): partial(read_streaming_rows, columns=THEIRS),
    (EXPORT, "pyarrow, arrow"): read_export,
}


@dataclass(frozen=True, slots=True)
class Read:
    """One pass over a data set."""

    seconds: float
    tokens: int  # of responses
    id_sum: int
    logprob_sum: float


def read_all(reader: Reader, path: Path) -> Read:
    began, tokens, ids, logprobs = time.perf_counter(), 0, 0, 0.0
    for _, ids_T, logprobs_T in reader(path):
        tokens += len(ids_T)
        ids += int(ids_T.sum(dtype=np.int64))
        logprobs += float(logprobs_T.sum(dtype=np.float64))
    return Read(time.perf_counter() - began, tokens, ids, logprobs)


def check_same(reads: dict[tuple[str, str], Read]) -> None:
    """All readers gave the same. Ends the program where one did not."""
    first = reads[SHARDS, "pyarrow, arrow"]
    for (form, way), read in reads.items():
        close = form == EXPORT or abs(read.logprob_sum - first.logprob_sum) <= 1e-6 * abs(first.logprob_sum)
        if (read.tokens, read.id_sum) != (first.tokens, first.id_sum) or not close:
            sys.exit(f"not the same content: {form}, {way}: {read}; our shards: {first}")


# ---- the two data sets


def make_demo(data: Path, prompts: int) -> None:
    from gftdata.config import GenerateConfig, load_config
    from gftdata.generate import generate

    sample = ROOT / "samples" / "demo"
    places = {"model": sample / "model", "prompts.path": sample / "train.jsonl", "out": data}
    values = {"prompts.limit": prompts, **{key: str(place) for key, place in places.items()}}
    generate(load_config(GenerateConfig, sample / "generate.yaml", values=values))


def compare(name: str, data: Path, repeats: int) -> None:
    """Write one data set in all ways, read each in all ways, print the table."""
    places = {
        SHARDS: data,
        JSONL: data.with_name(f"{name}.jsonl.zst"),
        ROWS: data.with_name(f"{name}-rows.parquet"),
        EXPORT: data.with_name(f"{name}-sft.parquet"),
    }
    for form, write in ((JSONL, write_jsonl), (ROWS, write_rows), (EXPORT, write_export)):
        write(data, places[form])
    sizes = {form: sum(Path(file).stat().st_size for file in files_of(place)) for form, place in places.items()}
    reads = {key: read_all(reader, places[key[0]]) for key, reader in READERS.items()}  # not counted: warms everything
    check_same(reads)
    tokens = reads[SHARDS, "pyarrow, arrow"].tokens
    rates: dict[tuple[str, str], list[float]] = {key: [] for key in READERS}
    for key in alternating(list(READERS), repeats):
        rates[key].append(tokens / read_all(READERS[key], places[key[0]]).seconds / 1e6)
    raw = statistics.median(rates[SHARDS, "pyarrow, arrow"])
    shown: set[str] = set()
    rows = []
    for (form, way), found in rates.items():
        size = "" if form in shown else f"{sizes[form] / tokens:.2f}"
        middle = spread(found)
        rows.append((form, way, size, f"{middle.median:.3f}", f"{middle.low:.3f} to {middle.high:.3f}"))
        rows[-1] += (f"{middle.median / raw:.2f}",)
        shown.add(form)
    print(f"\n{name}: {tokens:,} response tokens; medians of {repeats} rounds")
    print_table(("format", "read with", "bytes/token", "M tokens/s", "middle half", "ratio"), rows, left=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=4, help="synthetic ones, of 256 groups")
    parser.add_argument("--prompts", type=int, default=512, help="of the demo")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="seconds: a small shard, 8 prompts, one round")
    parser.add_argument("--folder", help="where the files are made and removed again; default: the temporary folder")
    options = parser.parse_args()
    lengths = LENGTHS
    if options.smoke:
        options.shards, options.prompts, options.repeats, lengths = 1, 8, 1, Lengths(prompt=16, shortest=4, longest=28)
    import_trainer()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make_data(folder / "synthetic", options.shards, lengths)
        compare("synthetic", folder / "synthetic", options.repeats)
        make_demo(folder / "demo", options.prompts)
        compare("demo", folder / "demo", options.repeats)
    print(f"\n{HOLD}")
    print_end("pyarrow", "datasets", "orjson")


if __name__ == "__main__":
    main()
