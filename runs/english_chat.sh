#!/usr/bin/env bash
# Trains a general English chat model on 45 % Wikipedia, 40 % books and 15 % Reddit, then on conversations alone. english_chat.toml has its architecture.
#     bash runs/english_chat.sh DIR                     12 hours; DIR holds wikipedia/, books/, reddit/ and dialog/
#     bash runs/english_chat.sh DIR --minutes 30        or --hours N, and any other flag of one_day.sh
#     bash runs/english_chat.sh DIR --dry_run           prints what the budget buys and what it takes, and stops
# If interrupted, start it again and it continues. All results are under NANOCHAT_BASE_DIR (default ~/.cache/nanochat).
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

texts=${1:-}
if [ -z "$texts" ] || [[ "$texts" == -* ]]; then
    sed -n '2,6s/^# \{0,1\}//p' "$repo/runs/english_chat.sh"
    [[ "$texts" == -h || "$texts" == --help ]] && exit 0
    echo "error: the first argument must be the folder of the texts: bash runs/english_chat.sh DIR" >&2
    exit 2
fi
shift
for name in wikipedia books reddit dialog; do
    [ -d "$texts/$name" ] || { echo "error: the folder $texts/$name does not exist: create it and put text files, JSON lines or parquet files into it" >&2; exit 2; }
done
hours=(--hours 12)
[[ " $* " =~ \ --(hours|minutes)[\ =] ]] && hours=()

exec bash "$repo/runs/one_day.sh" ${hours[@]+"${hours[@]}"} --recipe "$repo/runs/english_chat.toml" \
    --data "wikipedia=$texts/wikipedia:0.45" "books=$texts/books:0.40" "reddit=$texts/reddit:0.15" \
    --conversations "dialog=$texts/dialog:1" identity:0.02 "$@"
