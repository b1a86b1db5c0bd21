#!/usr/bin/env bash
# A general English chat model: 45 % Wikipedia, 40 % books, 15 % Reddit, then conversations alone; with the architecture of english_chat.toml.
#     bash runs/english_chat.sh DIR                     12 hours; DIR holds wikipedia/, books/, reddit/ and dialog/
#     bash runs/english_chat.sh DIR --minutes 30        or --hours N, and whatever else one_day.sh takes
# Interrupted and started again, it goes on where it stopped. Everything made is under NANOCHAT_BASE_DIR (default ~/.cache/nanochat).
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

texts=${1:-}
if [ -z "$texts" ] || [[ "$texts" == -* ]]; then
    sed -n '2,5s/^# \{0,1\}//p' "$repo/runs/english_chat.sh"
    [[ "$texts" == -h || "$texts" == --help ]] && exit 0
    echo "error: english_chat.sh needs the folder of the texts first" >&2
    exit 2
fi
shift
for name in wikipedia books reddit dialog; do
    [ -d "$texts/$name" ] || { echo "error: there is no folder $texts/$name: put text files, JSON lines or parquet there" >&2; exit 2; }
done
hours=(--hours 12)
[[ " $* " =~ \ --(hours|minutes)[\ =] ]] && hours=()

exec bash "$repo/runs/one_day.sh" ${hours[@]+"${hours[@]}"} --recipe "$repo/runs/english_chat.toml" \
    --data "wikipedia=$texts/wikipedia:0.45 books=$texts/books:0.40 reddit=$texts/reddit:0.15" \
    --talks "dialog=$texts/dialog:1 identity:0.02" "$@"
