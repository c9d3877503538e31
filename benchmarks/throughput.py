"""Response tokens a second of `gft generate`, against its bare engine and against what one would write without it.

    python benchmarks/throughput.py                                                # engine hf, the demo's prompts
    python benchmarks/throughput.py --python .venv-sglang/bin/python --cpu         # engine SGLang, on a CPU
    python benchmarks/throughput.py --python .venv-sglang/bin/python --model MODEL --file PROMPTS

The same prompts, the same number of self samples at temperature 1, the same limit on their tokens:

    gft generate   samples, journal, verdicts, log-probs, shards
    bare           the engine driven directly: samples and log-probs, nothing judged, nothing written. With hf in the
                   same batches; SGLang (bare_engine.py) with the same requests and the same number in flight
    datasets.map   hf only: plain_generate.py, `generate` + reward + log-prob pass + `to_parquet` in the same batches

Every run is a process of its own. What counts is the time from the model being there to the last file being written;
`whole command` has start-up in it. One round is one run of each, in turn first; the ratio of a round is ours / theirs.

After the first round (hf), what was written is looked at: as many responses on both sides; log-probs of 64 responses of
each side equal to 1e-4 those of a plain forward pass over that response alone; all verdicts those of our reward.
`--cpu` runs SGLang on a CPU (its torch_native attention).
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import ROOT, Failed, end, last_json, print_end, print_table, run_process, spread

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
OURS, BARE, PLAIN = "gft generate", "bare engine", "datasets.map"
SIZES = {  # what is asked for where the command line does not say
    "hf": {"prompts": 512, "samples": 7, "groups_per_shard": 128, "pairs": 5},  # samples/demo/generate.yaml's
    "sglang": {"prompts": 256, "samples": 4, "groups_per_shard": 16, "pairs": 7},
}
CHECKED = 64  # responses of each side
TOLERANCE = 1e-4  # nats


def settings(options: argparse.Namespace, out: Path) -> Any:
    from gftdata.config import GenerateConfig, validate_config

    hf = {"name": "hf", "batch_size": options.batch, "device": "cpu"}
    sglang = {
        "name": "sglang",
        "python": options.python,
        "max_in_flight": options.in_flight,
        "options": CPU if options.cpu else {},
    }
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
            "engine": sglang if options.python else hf,
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

    manifest = generate(settings(options, Path(options.out)), listen)
    return {"seconds": times[-1] - times[0], "tokens": manifest.summary.response_tokens}


def bare_hf(options: argparse.Namespace) -> dict[str, float]:
    """The embedded engine by itself: all samples, then all scores."""
    from gftdata.engines.hf import open_engine
    from gftdata.prepare import phases
    from gftdata.prompts import read_prompts
    from gftdata.tokens import encode_prompt, load_tokenizer
    from gftdata.types import SampleRequest, ScoreRequest

    config = settings(options, Path(options.out))
    tokenizer = load_tokenizer(config.model)
    (own,) = phases(config)
    engine = open_engine(config.model, config.engine, tokenizer)
    prompts = list(read_prompts(config.prompts, {}, needs_ground_truth=True))
    began = time.perf_counter()
    requests = [
        SampleRequest(prompt.prompt_id, k, prompt.messages, encode_prompt(tokenizer, prompt.messages), 1000 * n + k)
        for n, prompt in enumerate(prompts)
        for k in range(own.count)
    ]
    samples = list(engine.sample(requests, own.sampling))
    engine.score([ScoreRequest(sample.request.prompt_ids, sample.response_ids) for sample in samples])
    return {"seconds": time.perf_counter() - began, "tokens": sum(sample.num_tokens for sample in samples)}


def write_requests(options: argparse.Namespace, path: Path) -> None:
    """What our SGLang engine would send, in its order."""
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


def check(options: argparse.Namespace) -> dict[str, Any]:
    """That both sides did the same work, in their own process. Ends the program where they did not."""
    import numpy as np
    import pyarrow.parquet as pq
    import torch

    from gftdata.engines.hf import load_model, token_logprobs
    from gftdata.rewards import numeric
    from gftdata.types import Message, Prompt

    columns = ["prompt_ids", "response_ids", "ref_logprobs", "responses", "rewards"]
    folder, plain = Path(options.out), Path(options.check)
    truths = {
        row["question"]: row["answer"]
        for row in map(json.loads, Path(options.file).read_text().splitlines()[: options.prompts])
    }
    tables = {
        OURS: pq.read_table(folder / "data", columns=[*columns, "prompt"]),
        PLAIN: pq.read_table(plain, columns=[*columns, "question"]),
    }
    model = load_model(options.model, torch.float32, torch.device("cpu"))
    told: dict[str, Any] = {}
    for name, table in tables.items():
        groups = table.to_pylist()
        count = sum(len(group["responses"]) for group in groups)
        if count != options.prompts * options.samples:
            sys.exit(f"not the same work: {name}: {count} responses, expected {options.prompts * options.samples}")
        worst, looked_at = 0.0, 0
        for group in groups:
            question = group["question"] if name == PLAIN else group["prompt"][-1]["content"]
            messages = (Message("user", question),)
            prompt = Prompt("", None, messages, truths[question], "", (), "{}", question)
            for text, found in zip(group["responses"], group["rewards"], strict=True):
                if (wanted := numeric(prompt, text).reward) != found:
                    sys.exit(f"not the same work: {name}: {text!r} to {question!r} has reward {found}, not {wanted}")
            for ids, logprobs in zip(group["response_ids"], group["ref_logprobs"], strict=True):
                if looked_at == CHECKED:
                    break
                looked_at += 1
                with torch.inference_mode():
                    logits = model(torch.tensor([group["prompt_ids"] + ids])).logits[
                        :, len(group["prompt_ids"]) - 1 : -1
                    ]
                exact = token_logprobs(logits, torch.tensor([ids]))[0].numpy()
                worst = max(worst, float(np.abs(exact - np.array(logprobs, np.float32)).max()))
        if not worst <= TOLERANCE:
            sys.exit(f"not the same work: {name}: log-probs differ from a plain forward pass by up to {worst:.1e}")
        rewards = [reward for group in groups for reward in group["rewards"]]
        told[name] = {"responses": count, "worst": worst, "pass_rate": float(np.mean(rewards))}
    return told


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one side."""

    rate: float  # response tokens a second, start-up left out
    whole: float  # seconds of the whole process


def run(command: list[str], environment: dict[str, str]) -> Run:
    ran = run_process(command, environment)
    line = next(line for line in reversed(ran.stdout.splitlines()) if line.startswith('{"seconds"'))
    result = json.loads(line)
    return Run(result["tokens"] / result["seconds"], ran.seconds)


def compare(
    sides: dict[str, Callable[[], list[str]]],
    rounds: int,
    environment: dict[str, str],
    after_first: Callable[[], None] = lambda: None,
) -> None:
    """All rounds; prints a line for each, then medians."""
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides) if number % 2 == 0 else reversed(sides):
            runs[name].append(run(sides[name](), environment))
        parts = [f"{name} {found[-1].rate:,.0f} tok/s" for name, found in runs.items()]
        print(f"round {number + 1}: {', '.join(parts)}", flush=True)
        if number == 0:
            after_first()
    rows = []
    for name, found in runs.items():
        ratios = [mine.rate / one.rate for mine, one in zip(runs[OURS], found, strict=True)]
        rates, whole = spread([one.rate for one in found]), spread([one.whole for one in found])
        ours_over = "" if name == OURS else spread(ratios).text(".3f")
        rows.append((name, rates.text(",.0f"), whole.text(".1f"), ours_over))
    print()
    print_table(("", "response tok/s", "whole command, s", "gft generate / it"), rows)
    print(f"\nmedians of {rounds} rounds (middle half)")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="interpreter that has SGLang; without it, engine hf")
    parser.add_argument("--model", default="samples/demo/model")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--pairs", type=int, help="rounds")
    parser.add_argument("--file", default="samples/demo/train.jsonl", help="prompts: question and answer")
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--samples", type=int, help="of each prompt")
    parser.add_argument("--tokens", type=int, default=48, help="at most, of a sample")
    parser.add_argument("--batch", type=int, default=512, help="hf: samples drawn together")
    parser.add_argument("--in-flight", type=int, default=32, help="SGLang: samples drawn together")
    parser.add_argument("--groups-per-shard", type=int)
    parser.add_argument("--side", choices=("ours", "bare", "check", "requests"), help=argparse.SUPPRESS)
    parser.add_argument("--out", default="nowhere", help=argparse.SUPPRESS)
    parser.add_argument("--check", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name, value in SIZES["sglang" if options.python else "hf"].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.model, options.file = (str((ROOT / path).absolute()) for path in (options.model, options.file))
    if options.python:
        options.python = str((ROOT / options.python).absolute())
    return options


def main() -> None:
    options = parse()
    if options.side == "requests":
        write_requests(options, Path(options.out))
        return
    if options.side:
        print(json.dumps({"ours": ours, "bare": bare_hf, "check": check}[options.side](options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        this = [sys.executable, __file__, *sys.argv[1:], "--side"]
        count = itertools.count()
        passive = {"OMP_WAIT_POLICY": "PASSIVE"}  # threads that spin steal from judges and driver
        plain = Path(folder) / "plain.parquet"

        def mine() -> list[str]:
            return [*this, "ours", "--out", f"{folder}/data-{next(count)}"]

        if options.python:
            requests = f"{folder}/requests.json"
            run_process([*this, "requests", "--out", requests])
            engine = {"model_path": options.model, "log_level": "error", **(CPU if options.cpu else {})}
            script = str(Path(__file__).with_name("bare_engine.py"))
            bare = [options.python, script, json.dumps(engine), requests, str(options.in_flight)]
            path = os.pathsep.join([str(AID), *filter(None, [os.environ.get("PYTHONPATH")])])
            compare({OURS: mine, BARE: lambda: bare}, options.pairs, passive | {"PYTHONPATH": path})
        else:
            sizes = [str(size) for size in (options.prompts, options.samples, options.tokens, options.batch)]
            script = str(Path(__file__).with_name("plain_generate.py"))
            theirs = [sys.executable, script, options.model, options.file, str(plain), *sizes]

            def same() -> None:
                told = last_json(run_process([*this, "check", "--out", f"{folder}/data-0", "--check", str(plain)]))
                for name, one in told.items():
                    print(
                        f"  {name}: {one['responses']:,} responses, pass rate {one['pass_rate']:.3f}, log-probs within "
                        f"{one['worst']:.0e} of a plain forward pass",
                        flush=True,
                    )

            sides = {OURS: mine, BARE: lambda: [*this, "bare"], PLAIN: lambda: theirs}
            compare(sides, options.pairs, passive, same)
    print_end("torch", "transformers", "datasets")


if __name__ == "__main__":
    try:
        main()
    except Failed as failed:
        end(failed)
