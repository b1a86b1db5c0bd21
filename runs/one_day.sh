#!/usr/bin/env bash
# Trains the best chat model that the hours allow: measures the machine (probe), chooses a model (recipe), tests the choice (pilot), trains it, reports.
#     bash runs/one_day.sh                                     24 hours, on web text (downloaded first)
#     bash runs/one_day.sh --minutes 20                        a small run on the embedded corpus
#     bash runs/one_day.sh --hours 8 --data wiki=DIR:0.6 books=DIR:0.4 --conversations mine=FILE.jsonl:1 identity:1
#     bash runs/one_day.sh --hours 8 --target 0.9              says after the pilot whether 0.9 bits per byte are within reach
#     bash runs/one_day.sh --hours 8 --recipe FILE.toml        with the architecture of a recipe
#     bash runs/one_day.sh --hours 8 --lookback off            on a CPU: a model that llama.cpp can run
#     bash runs/one_day.sh --hours 8 --task_dir DIR            with ARC, MMLU and GSM8K from a folder instead of the hub
#     bash runs/one_day.sh --hours 24 --dry_run                prints what the budget buys and what it takes, and stops
#     bash runs/one_day.sh --hours 8 --device_type cpu         on a Mac: on its CPU instead of its GPU
# If interrupted, start it again and it continues. All results are under NANOCHAT_BASE_DIR (default ~/.cache/nanochat).
set -euo pipefail
here=$PWD
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$repo/runs/values.sh"

minutes="" unit="" data=() conversations=() vocab="" target=0 open=() tasks=() device=() dry=""
while [ $# -gt 0 ]; do
    case "$1" in
        --data | --conversations | --talks) # values up to the next flag; --talks is the former name
            flag=$1
            shift
            [ $# -gt 0 ] && [[ "$1" != --* ]] || { echo "error: $flag needs a value: name a file, a folder or tinyworld" >&2; exit 2; }
            while [ $# -gt 0 ] && [[ "$1" != --* ]]; do
                sources "$1"
                if [ "$flag" = --data ]; then data+=("${found[@]}"); else conversations+=("${found[@]}"); fi
                shift
            done
            continue ;;
        --*=*) flag=${1%%=*} value=${1#*=}; shift ;;
        -h | --help) sed -n '2,12s/^# \{0,1\}//p' "$repo/runs/one_day.sh"; exit 0 ;;
        --dry_run) dry=1; shift; continue ;;
        *) flag=$1 value=${2:-}; shift $(($# > 1 ? 2 : 1)) ;;
    esac
    case "$flag" in
        --minutes | --hours)
            [ -z "$minutes" ] || [ "$flag" = "$unit" ] || { echo "error: --hours and --minutes set two budgets: give only one of them" >&2; exit 2; }
            if ! [[ "$value" =~ ^[0-9]+$ ]] || [ "$value" -lt 1 ]; then
                echo "error: $flag must be a whole number of at least 1 (got '$value')" >&2
                exit 2
            fi
            unit=$flag minutes=$((10#$value)) # read 08 as a decimal number
            [ "$flag" = --minutes ] || minutes=$((minutes * 60)) ;;
        --data) sources "$value"; data+=("${found[@]}") ;;
        --conversations | --talks) sources "$value"; conversations+=("${found[@]}") ;;
        --vocab) vocab=$value ;;
        --target)
            [[ "$value" =~ ^([0-9]+\.?[0-9]*|\.[0-9]+)$ ]] || { echo "error: --target must be a number of bits per byte, as in --target 0.9 (got '$value')" >&2; exit 2; }
            target=$value ;;
        --task_dir) tasks=(--task_dir "$value") ;;
        --recipe) open+=(--recipe "$value") ;;
        --lookback) open+=(--lookback "$value") ;;
        --device_type) device=(--device_type "$value") ;;
        *) echo "error: one_day.sh has no option $flag: use --hours, --minutes, --data, --conversations, --task_dir, --vocab, --recipe, --lookback, --device_type, --target or --dry_run" >&2; exit 2 ;;
    esac
done
minutes=${minutes:-1440}
if [ "$minutes" -lt 10 ]; then
    echo "error: $minutes minutes are too few to measure the machine and to train three stages: give at least 10, or run runs/quickstart.sh, which needs less" >&2
    exit 2
fi
cd "$repo"
source runs/environment.sh
cd "$here" # file names are relative to the folder where the script was started
export PYTHONSAFEPATH=1 # that folder may hold a statistics.py, which must not be imported

tag="day-$minutes"
base=$NANOCHAT_BASE_DIR
out="$base/day/$minutes-minutes"
open+=(${device[@]+"${device[@]}"})
asked=(${open[@]+"${open[@]}"} --minutes="$minutes")
[ ${#data[@]} = 0 ] || asked+=(--data "${data[@]}")
[ -z "$vocab" ] || asked+=(--vocab="$vocab")
later=(${conversations[@]+--conversations "${conversations[@]}"} ${tasks[@]+"${tasks[@]}"})
asked+=(${later[@]+"${later[@]}"})
[ -z "$dry" ] || exec python -m scripts.plan day "${asked[@]}"
resumable "$out"
given=$(quoted "${asked[@]}")
earlier=$given # as earlier versions stored it
! relative "${asked[@]}" || given+="in $here"
[ -e "$out/asked" ] || printf '%s\n' "$given" >"$out/asked"
stored=$(cat "$out/asked")
[ "$given" = "$stored" ] || [ "$earlier" = "$stored" ] || {
    echo "error: the run of $minutes minutes in $out was begun with other flags or in another folder: $stored. Give the same flags there or another length, or move that folder and the models named $tag away" >&2
    exit 2
}
# What to fetch follows from the plan, which stops here if disk, memory or text do not suffice. It is fixed at the first start.
[ -e "$out/settled" ] || {
    say "plan"
    settled=$(python -m scripts.plan day "${asked[@]}" --shell) || exit
    printf '%s\n' "$settled" >"$out/settled"
}
source "$out/settled" # vocab, web, text
[ ${#data[@]} != 0 ] || data=("$text")
text=(--data "${data[@]}")
recipe=(--recipe "$out/recipe.toml" --resume=auto)

# The clock starts when data and tokenizer are ready.
for set in $web; do
    from=(-n "${set#*:}" --set "${set%:*}")
    step "web text of ${set%:*}" python -m nanochat.dataset "${from[@]}"
done
tokenizer_of "$out/tokenizer" "$tag" python -m scripts.tok_train --vocab_size="$vocab" "${text[@]}"
talks=(--conversations ${conversations[@]+"${conversations[@]}"})
[ ${#conversations[@]} != 0 ] || talks+=(default)
step tokens python -m scripts.tok_data "${text[@]}" "${talks[@]}" ${tasks[@]+"${tasks[@]}"}
[ -e "$out/begun" ] || echo $((before + SECONDS)) >"$out/begun"
step probe python -m scripts.plan probe ${open[@]+"${open[@]}"} --minutes="$minutes" --vocab="$vocab"
# The recipe leaves time for the pilot, and knows how much of the budget is used up: the number is fixed at the first start, so that an
# interrupted stage keeps its length.
[ -e "$out/used" ] || {
    used=$((before + SECONDS - $(cat "$out/begun")))
    echo $((used > 0 ? used : 0)) >"$out/used"
}
plan=(${open[@]+"${open[@]}"} --minutes="$minutes" --used="$(cat "$out/used")" --pilot --vocab="$vocab" ${later[@]+"${later[@]}"})
step recipe python -m scripts.plan recipe "${plan[@]}" --out="$out/recipe.toml" --model_tag="$tag" "${text[@]}"
[ $((minutes * 60 - $(cat "$out/used"))) -lt 1500 ] || step pilot python -m scripts.plan pilot "$out/recipe.toml" --target_bpb="$target" || {
    status=$?
    [ $status = 3 ] || exit $status # 3: the pilot was refused, with the reason; the recipe stays as it is
    touch "$out/pilot.done"
}
# replan STAGE: where the machine was slower than planned, or time is left over, shares it anew, so that the deadline holds. `again` are the
# flags that replace those of the recipe, fixed at the first start of a stage.
replan() {
    [ -e "$out/$1.flags" ] || python -c "import sys; from nanochat.plan.recipe import replanned
print(*replanned(sys.argv[1], sys.argv[2], float(sys.argv[3])))" "$out/recipe.toml" "$1" $((minutes * 60 + $(cat "$out/begun") - before - SECONDS)) >"$out/$1.new"
    [ -e "$out/$1.flags" ] || mv "$out/$1.new" "$out/$1.flags"
    again=($(cat "$out/$1.flags"))
}
replan base_train
step pretraining python -m scripts.base_train "${recipe[@]}" ${again[@]+"${again[@]}"}
step "evaluation of the base model" python -m scripts.base_eval --model_tag="$tag" --eval_tokens=262144 ${device[@]+"${device[@]}"}
replan mid_train
step midtraining python -m scripts.mid_train "${recipe[@]}" ${again[@]+"${again[@]}"}
replan chat_sft
step finetuning python -m scripts.chat_sft "${recipe[@]}" ${again[@]+"${again[@]}"}
replan evaluation
asked=(-a tinyworld)
for source in "${data[@]}"; do
    case "${source#*=}" in
        tinyworld | tinyworld@* | tinyworld:*) ;;
        *) asked=(-a ARC-Easy MMLU GSM8K -n 500 ${tasks[@]+"${tasks[@]}"}) ;;
    esac
done
step "evaluation of the finetuned model" python -m scripts.chat_eval -i sft -g "$tag" ${device[@]+"${device[@]}"} "${asked[@]}" ${again[@]+"${again[@]}"} || {
    status=$?
    [ $status = 2 ] || exit $status
    echo "notice: the finetuned model was not evaluated (see above); the report omits its scores"
}

say "report"
runs=("$base/checkpoints/base/$tag" "$base/checkpoints/mid/$tag" "$base/checkpoints/sft/$tag")
python -m nanochat.report "${runs[@]}" --out="$out/report.html"
python -m scripts.summary --model_tag="$tag" --out="$out" --seconds=$((before + SECONDS)) --samples=0
