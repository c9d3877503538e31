"""Output tokens per second of `gft generate` on SGLang, against the bare engine driven with the same requests.

    python benchmarks/throughput.py --python .venv-sglang/bin/python [--model MODEL --file PROMPTS] [--cpu]

Ours has self samples, rewards, scoring and the writing of shards in it; the bare engine samples and scores. Both start
their engine anew for each run, and starting is not counted. One pair is one run of each, in turn first; the ratio of a
pair is ours / bare. `--cpu` runs SGLang on a CPU (its torch_native attention).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
AID = ROOT / "tests" / "sglang" / "aid"
CPU = {
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "torch_native",
    "disable_overlap_schedule": True,
    "disable_cuda_graph": True,
    "mem_fraction_static": 0.3,
    "max_total_tokens": 32768,
}


def settings(options: argparse.Namespace, out: Path) -> Any:
    from gftdata.config import GenerateConfig, validate_config

    return validate_config(
        GenerateConfig,
        {
            "model": options.model,
            "out": str(out),
            "prompts": {
                "path": options.file,
                "columns": {"question": "question", "ground_truth": "answer"},
                "limit": options.prompts,
            },
            "reward": {"name": "numeric", "workers": 1},
            "responses": {"expert": {"count": 0}, "self": {"count": options.samples}, "max_tokens": options.tokens},
            "engine": {
                "name": "sglang",
                "python": options.python,
                "max_in_flight": options.in_flight,
                "options": CPU if options.cpu else {},
            },
            "shards": {"groups_per_shard": options.groups_per_shard},
        },
        "benchmark",
    )


def ours(options: argparse.Namespace) -> dict[str, float]:
    """One `gft generate` in this process: from the engine being up to the last shard being published."""
    from gftdata.events import Event
    from gftdata.generate import generate

    times: list[float] = []

    def listen(event: Event) -> None:
        if event.kind in ("phase", "shard"):
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        manifest = generate(settings(options, Path(folder) / "data"), listen)
    return {"seconds": times[-1] - times[0], "tokens": manifest.summary.response_tokens}


def write_requests(options: argparse.Namespace, path: Path) -> None:
    """What our engine would send, in its order."""
    from gftdata.prepare import phases
    from gftdata.prompts import read_prompts
    from gftdata.tokens import encode_prompt, load_tokenizer

    config = settings(options, path.with_name("none"))
    tokenizer = load_tokenizer(config.model)
    (own,) = phases(config)
    requests = [
        {
            "input_ids": encode_prompt(tokenizer, prompt.messages).tolist(),
            "sampling_params": {
                "temperature": own.sampling.temperature,
                "top_p": own.sampling.top_p,
                "max_new_tokens": own.sampling.max_tokens,
                "stop_token_ids": list(tokenizer.stop_ids),
                "no_stop_trim": True,
                "skip_special_tokens": True,
            },
            "return_logprob": True,
        }
        for prompt in read_prompts(config.prompts, {}, needs_ground_truth=True)
        for _ in range(own.count)
    ]
    path.write_text(json.dumps(requests))


def run(command: list[str]) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str(AID), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"seconds"')]
    if not lines:
        sys.exit(f"{' '.join(command)[:200]} failed:\n{done.stderr[-3000:]}")
    result: dict[str, float] = json.loads(lines[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="interpreter that has SGLang")
    parser.add_argument("--model", default="samples/demo/model")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--file", default="samples/demo/train.jsonl", help="prompts: question and answer")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--samples", type=int, default=4, help="of each prompt")
    parser.add_argument("--tokens", type=int, default=48, help="at most, of a sample")
    parser.add_argument("--in-flight", type=int, default=32)
    parser.add_argument("--groups-per-shard", type=int, default=16)
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.python, options.model = str(Path(options.python).absolute()), str(Path(options.model).absolute())
    if options.ours:
        print(json.dumps(ours(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        requests = Path(folder) / "requests.json"
        write_requests(options, requests)
        engine = {"model_path": options.model, "log_level": "error", **(CPU if options.cpu else {})}
        bare = [options.python, "benchmarks/bare_engine.py", json.dumps(engine), str(requests), str(options.in_flight)]
        mine = [sys.executable, __file__, "--ours", *sys.argv[1:]]
        print(f"{'pair':>4} {'bare':>16} {'gft generate':>16} {'ratio':>7}")
        ratios = []
        for pair in range(options.pairs):
            order = [bare, mine] if pair % 2 == 0 else [mine, bare]
            results = {id(command): run(command) for command in order}
            b, m = results[id(bare)], results[id(mine)]
            rates = b["tokens"] / b["seconds"], m["tokens"] / m["seconds"]
            ratios.append(rates[1] / rates[0])
            print(f"{pair + 1:>4} {rates[0]:>9.1f} tok/s {rates[1]:>9.1f} tok/s {ratios[-1]:>7.3f}", flush=True)
    ratios.sort()
    spread = (len(ratios) - 1) * 0.25
    low, high = ratios[round(spread)], ratios[round(len(ratios) - 1 - spread)]
    print(
        f"\nmedian ratio {statistics.median(ratios):.3f}, middle half {low:.3f} to {high:.3f}, of {len(ratios)} pairs"
    )


if __name__ == "__main__":
    main()
