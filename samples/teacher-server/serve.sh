#!/usr/bin/env bash
# A teacher's server, response groups with it, and the end of the server, as three jobs.
#   samples/teacher-server/serve.sh MODEL generate.yaml [more options of gft generate]
# Where a server has ended too early, the same command continues: another one's address changes nothing in the recipe.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,4s/^# \?//p' "$0" >&2; exit 2; }
model=$1 config=$2
shift 2
here=$(dirname "$0")
read -ra teacher_job <<< "${TEACHER_JOB:-}"    # more options of sbatch
read -ra generate_job <<< "${GENERATE_JOB:-}"
ready=${config%.yaml}.ready.yaml

teacher=$(sbatch --parsable "${teacher_job[@]}" "$here/teacher.sbatch" "$model" "$config" "$ready")
# A minute after the server's job has started the config is there; gft waits for the server itself.
generate=$(sbatch --parsable --dependency="after:${teacher%%;*}${TEACHER_WAIT-+1}" --kill-on-invalid-dep=yes \
    "${generate_job[@]}" "$here/../slurm/generate.sbatch" "$ready" "$@")
sbatch --parsable --dependency="afterany:${generate%%;*}" --job-name=gft-teacher-ends --output=/dev/null \
    --wrap "scancel ${teacher%%;*}" > /dev/null
echo "teacher ${teacher%%;*}, generate ${generate%%;*}"
