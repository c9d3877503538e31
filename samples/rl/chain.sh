#!/bin/sh
# SFT -> GFT -> GRPO, the paper's chain, on the demo's tiny model: each stage starts from the last one's checkpoint.
# From the repository's root: sh samples/rl/chain.sh [OUT] [LIMIT], with `gft` on the path and TRL in TRL_PYTHON's
# environment (make test-interchange creates .venv-trl). LIMIT takes fewer of the 512 prompts.
# Stopped anywhere, the same command continues.
set -e
out=${1:-runs/chain} limit=${2:-512} here=samples/rl
trl=${TRL_PYTHON:-.venv-trl/bin/python}
base=samples/demo/model

echo "== SFT: on the experts' responses"
gft generate samples/demo/generate.yaml --out "$out/experts" --set responses.self.count=0 --set prompts.limit="$limit"
gft train samples/objectives/sft.yaml --model $base --data "$out/experts" --out "$out/sft" --set epochs=2

echo "== GFT: on groups that the SFT model draws"
gft generate samples/rounds/again.yaml --model "$out/sft/final" --set prompts.reuse="$out/experts" --out "$out/groups"
gft train samples/objectives/gft.yaml --model "$out/sft/final" --data "$out/groups" --out "$out/gft" --set epochs=2

echo "== GRPO: TRL, on the same prompts with the same reward"
[ -f "$out/prompts.parquet" ] || gft export "$out/groups" --format trl-grpo --out "$out/prompts.parquet"
[ -f "$out/grpo/final/model.safetensors" ] || OMP_WAIT_POLICY=PASSIVE PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" "$trl" $here/grpo.py \
    --model "$out/gft/final" --prompts "$out/prompts.parquet" --reward numeric --out "$out/grpo"

echo "== accuracy on sums that no stage was trained on"
for stage in base sft gft grpo; do
    model=$out/$stage/final
    [ $stage = base ] && model=$base
    gft eval samples/demo/eval.yaml --model "$model" --out "$out/$stage" > "$out/$stage.txt"
done
python - "$out" <<'END'
import json, sys
import pyarrow.compute as pc, pyarrow.parquet as pq
print(f"{'after':<6}{'pass@1':>8}{'+-':>8}{'pass@16':>9}{'greedy':>8}{'entropy':>9}{'KL':>8}")
for stage in ("base", "sft", "gft", "grpo"):
    with open(f"{sys.argv[1]}/{stage}/evals.jsonl") as file:
        r = [line for line in map(json.loads, file) if line["benchmark"] == "sums"][-1]
    samples = pq.read_table(f"{sys.argv[1]}/{stage}/evals/sums/samples.parquet", filters=~pc.field("greedy"))
    rates = samples.group_by("prompt_id").aggregate([("reward", "mean")])["reward_mean"]
    error = pc.stddev(rates, ddof=1).as_py() / len(rates) ** 0.5
    once, often, greedy = (found["value"] for found in (r["pass_at"]["1"], r["pass_at"]["16"], r["greedy"]))
    numbers = (once, error, often, greedy, r["entropy"], r["kl"])
    print(f"{stage:<6}" + "".join(f"{n:>{w}.3f}" for n, w in zip(numbers, (8, 8, 9, 8, 9, 8))))
END
