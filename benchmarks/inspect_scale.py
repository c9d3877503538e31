"""How long `gft inspect` takes for a million groups, and in how much memory.

    python benchmarks/inspect_scale.py                      # a million groups; minutes, 2.6 GB of disk
    python benchmarks/inspect_scale.py --groups 100000      # fewer

Makes shards as synthetic.py does, of 256 groups of 8 responses each: prompts of 200 tokens, responses of 4 to 28. The
responses are short because the long columns are not read, except in a few row groups. Then the command runs as a
process, with what was written still in the page cache: once as it stands, once with --json, and once with --model, for
which tokenizer and template of samples/demo are entered into the manifest (the prompts do not come from them, and the
audit says so). Seconds are of the whole process, start-up included, and depend on what else the machine does; CPU
seconds, of all threads, hardly do. Memory is the peak resident size.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from measure import ROOT, Failed, end, print_end, print_table, run_process

MODEL = ROOT / "samples" / "demo" / "model"


def make(data: Path, groups: int) -> None:
    """Shards and a manifest that names the tokenizer of MODEL."""
    from synthetic import Lengths, make_data

    from gftdata.config import ShardsConfig
    from gftdata.manifest import read_manifest, write_manifest
    from gftdata.store import FolderStore
    from gftdata.tokens import load_tokenizer

    num_shards = max(1, -(-groups // ShardsConfig().groups_per_shard))
    make_data(data, num_shards, Lengths(prompt=200, shortest=4, longest=28))
    tokenizer, manifest = load_tokenizer(str(MODEL)), read_manifest(data)
    record = manifest.tokenizer.model_copy(update={"hash": tokenizer.hash, "template_hash": tokenizer.template_hash})
    write_manifest(FolderStore(data), manifest.model_copy(update={"tokenizer": record}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=1_000_000)
    parser.add_argument("--folder", help="where the shards are made and removed again; default: the temporary folder")
    parser.add_argument("--make", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(Path(options.make), options.groups)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        data = str(Path(folder) / "data")
        run_process([sys.executable, __file__, "--groups", str(options.groups), "--make", data])
        gft = [sys.executable, "-m", "gftcli.main", "inspect", data]
        runs = {
            name: run_process([*gft, *words])
            for name, words in {
                "": [],
                "--json": ["--json"],
                "--model samples/demo/model": ["--model", str(MODEL)],
            }.items()
        }
    found = json.loads(runs["--json"].stdout)
    groups, responses = found["counts"]["summary"]["groups"], found["counts"]["summary"]["responses"]
    print(f"{groups:,} groups, {responses:,} responses, {found['shards']:,} shards, {found['bytes'] / 1e9:.2f} GB\n")
    print_table(
        ("command", "seconds", "CPU s", "peak MB"),
        [
            (
                f"gft inspect DATA {name}".rstrip(),
                f"{done.seconds:.1f}",
                f"{done.cpu_seconds:.1f}",
                f"{1024 * done.peak_gib:,.0f}",
            )
            for name, done in runs.items()
        ],
    )
    print_end("pyarrow", "polars")


if __name__ == "__main__":
    try:
        main()
    except Failed as failed:
        end(failed)
