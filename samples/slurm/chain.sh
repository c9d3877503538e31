#!/usr/bin/env bash
# generate -> finalize -> train -> eval as four jobs; each starts when the one before has ended well.
#   samples/slurm/chain.sh generate.yaml train.yaml eval.yaml OUT
# OUT gets data/ and train/, with the results in train/evals.jsonl. Given again after a failure, the same command
# continues: what is finished is looked at and left alone.
set -euo pipefail
[ $# = 4 ] || { sed -n '2,5s/^# \?//p' "$0" >&2; exit 2; }
generate=$1 train=$2 eval=$3 out=$4
here=$(dirname "$0")
# More options of sbatch for a step, e.g. GENERATE_JOB="--array=0-3 --partition=small"
read -ra generate_job <<< "${GENERATE_JOB:-}"
read -ra finalize_job <<< "${FINALIZE_JOB:-}"
read -ra train_job <<< "${TRAIN_JOB:-}"
read -ra eval_job <<< "${EVAL_JOB:-}"

# submit NAME AFTER SBATCH-WORDS...: prints the job's number
submit() {
    local name=$1 after=$2 job
    shift 2
    job=$(sbatch --parsable ${after:+--dependency=afterok:$after --kill-on-invalid-dep=yes} "$@")
    echo "$name ${job%%;*}" >&2
    echo "${job%%;*}"
}

job=$(submit generate "" "${generate_job[@]}" "$here/generate.sbatch" "$generate" --out "$out/data")
job=$(submit finalize "$job" "${finalize_job[@]}" "$here/finalize.sbatch" "$out/data")
job=$(submit train "$job" "${train_job[@]}" "$here/train.sbatch" "$train" --data "$out/data" --out "$out/train")
submit eval "$job" "${eval_job[@]}" "$here/eval.sbatch" "$eval" --model "$out/train" --out "$out/train" > /dev/null
