#!/bin/sh
# generate -> train -> generate again from the trained model -> train: what answers samples that have gone stale.
# From the repository's root: sh samples/rounds/rounds.sh [ROUNDS] [OUT] [further `gft generate` options]
# Stopped anywhere, the same command continues: finished steps are looked at and left alone.
set -e
rounds=${1:-3} out=${2:-runs/rounds} here=samples/rounds
if [ $# -gt 2 ]; then shift 2; else shift $#; fi

model=samples/demo/model
round=0
while [ "$round" -lt "$rounds" ]; do
    echo "== round $round"
    if [ "$round" = 0 ]; then
        gft generate $here/generate.yaml --model "$model" --out "$out/0/data" "$@"
    else
        gft generate $here/again.yaml --model "$model" --out "$out/$round/data" \
            --set prompts.reuse="$out/$((round - 1))/data" "$@"
    fi
    gft train $here/train.yaml --model "$model" --data "$out/$round/data" --out "$out/$round/train"
    model=$out/$round/train/final
    gft eval samples/demo/eval.yaml --model "$model"
    round=$((round + 1))
done
