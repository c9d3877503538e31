#!/bin/sh
# Group composition at K = 8, demonstrations (1 expert, the rest teacher) : own samples = 8:0, 6:2, 4:4, 2:6, 0:8.
# Prompts and given texts are the same; samples are drawn anew for each, as many as it needs.
#   sh samples/paper/composition.sh [more arguments for gft compare, e.g. --nproc 8]
set -eu
cd "$(dirname "$0")/../.."
out=runs/paper/composition
for teachers in 7 5 3 1 none; do
  case $teachers in
    none) name=0-8 given="responses.expert.count=0 responses.teachers=[]" own=8 ;;
    *) name=$((teachers + 1))-$((7 - teachers)) given="responses.teachers.qwen-math-72b.count=$teachers" own=$((7 - teachers)) ;;
  esac
  overrides="--set responses.self.count=$own"
  for setting in $given; do overrides="$overrides --set $setting"; done
  # shellcheck disable=SC2086  # settings without blanks
  gft generate samples/paper/generate.yaml --out "$out/$name/groups" $overrides
  gft compare samples/paper/compare.yaml --data "$out/$name/groups" --out "$out/$name" \
    --set 'methods=[GFT]' --set 'objectives={}' "$@"
done
gft report "$out"/*/gft --out "$out/report.html"
