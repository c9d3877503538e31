"""What `gft generate` itself takes, the engine apart: memory for any number of prompts, Python time for a sample.

    python benchmarks/own_cost.py            # 1,000 and 100,000 prompts of 1 expert and 2 self responses; minutes
    python benchmarks/own_cost.py --prompts 10000 --tokens 512

Each size runs in a process of its own against a fake engine that answers at once. Memory is the peak resident size of
our process; time is the processor time of all its threads (user and system) from the engine being up to the end, so
that nobody's waiting counts. Engine and judges are other processes.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from measure import ROOT, Failed, end, last_json, peak_megabytes, print_end, print_table, run_process


def holding(model: Path, num_tokens: int, folder: Path) -> Path:
    """The model, or a copy that says it has a longer context: nothing is run on it but its tokenizer."""
    config = json.loads((model / "config.json").read_text())
    if config["max_position_embeddings"] < 2 * num_tokens:
        model = Path(shutil.copytree(model, folder / "model"))
        (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2 * num_tokens}))
    return model


def measure(num_prompts: int, response_tokens: int, model: str) -> dict[str, float]:
    """One generation in this process."""
    import gftdata.engines.sglang as sglang
    from gftdata.config import GenerateConfig, validate_config
    from gftdata.events import Event
    from gftdata.generate import generate
    from gftdata.shards import verify
    from gftdata.tokens import encode_response, load_tokenizer

    sglang.WORKER = Path(__file__).with_name("fake_engine.py")
    sglang.check_python = lambda config: None
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        with prompts.open("w") as file:
            for n in range(num_prompts):
                question = f"{n // 8100 % 90 + 10}+{n // 90 % 90 + 10}+{n % 90 + 10}="
                file.write(json.dumps({"question": question, "answer": str(n), "expert": f"={n}"}) + "\n")
        alphabet = encode_response(load_tokenizer(model), "0123456789", ended=True).tolist()
        config = {
            "model": str(holding(Path(model), response_tokens, Path(folder))),
            "out": str(Path(folder) / "data"),
            "prompts": {"path": str(prompts), "columns": {"ground_truth": "answer", "expert": "expert"}},
            "reward": {"name": "exact"},
            "responses": {"self": {"count": 2}, "max_tokens": response_tokens},
            "engine": {"name": "sglang", "options": {"num_tokens": response_tokens, "alphabet": alphabet}},
        }
        up: list[float] = []

        def listen(event: Event) -> None:
            if event.kind == "phase":
                up.append(time.process_time())

        settings = validate_config(GenerateConfig, config, "benchmark")
        manifest = generate(settings, listen)
        worked = time.process_time() - up[0]
        problems = [] if num_prompts > 10_000 else verify(Path(settings.out))
    assert not problems, problems
    samples = sum(source.responses for source in manifest.summary.sources if source.source == "self")
    assert samples == 2 * num_prompts == 2 * manifest.summary.groups
    return {
        "prompts": num_prompts,
        "tokens": response_tokens,
        "samples": samples,
        "peak_mb": peak_megabytes(),
        "ms_per_sample": 1000 * worked / samples,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1_000, 100_000])
    parser.add_argument("--tokens", type=int, default=32, help="of each sample")
    parser.add_argument("--model", default=str(ROOT / "samples" / "demo" / "model"), help="whose tokenizer is used")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.tokens, options.model)))
        return
    rows = []
    for number in options.prompts:
        command = [sys.executable, __file__, "--one", str(number), "--tokens", str(options.tokens)]
        command += ["--model", options.model]
        rows.append(last_json(run_process(command)))
    print_table(
        ("prompts", "samples", "of tokens", "peak memory", "ratio", "Python time a sample"),
        [
            (
                f"{row['prompts']:,}",
                f"{row['samples']:,}",
                f"{row['tokens']}",
                f"{row['peak_mb']:,.0f} MB",
                f"{row['peak_mb'] / rows[0]['peak_mb']:.3f}",
                f"{row['ms_per_sample']:.3f} ms",
            )
            for row in rows
        ],
        left=0,
    )
    print_end("pyarrow")


if __name__ == "__main__":
    try:
        main()
    except Failed as failed:
        end(failed)
