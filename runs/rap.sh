#!/usr/bin/env bash
# Tests whether an attention prior helps on a text: computes the prior from the training split, trains with and without it, and compares.
#     bash runs/rap.sh                                                              on the Python files of Python's own library; about half an hour on two CPU cores
#     bash runs/rap.sh --seeds 5 --steps 400 --data books=DIR:0.6 notes=DIR:0.4     on your own text, with 5 seeds and 400 steps (defaults: 3 and 600)
# If interrupted, start it again and it continues. All results are in rap/ under NANOCHAT_BASE_DIR (default ~/.cache/nanochat).
set -euo pipefail
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
repo=$PWD
source runs/values.sh

seeds=3 steps=600 data=() folder=""
while [ $# -gt 0 ]; do
    case "$1" in
        --seeds | --steps) declare "${1#--}=${2:-}"; shift $(($# > 1 ? 2 : 1)) ;;
        --seeds=* | --steps=*) word=${1#--}; declare "${word%%=*}=${word#*=}"; shift ;;
        --data) shift; while [ $# -gt 0 ] && [[ "$1" != --* ]]; do sources "$1"; data+=("${found[@]}"); shift; done ;;
        -h | --help) sed -n '2,5s/^# \{0,1\}//p' "$repo/runs/rap.sh"; exit 0 ;;
        *) echo "error: rap.sh has no option $1: use --seeds N, --steps N or --data SOURCE ..." >&2; exit 2 ;;
    esac
done
for n in seeds steps; do
    [[ "${!n}" =~ ^[1-9][0-9]*$ ]] || { echo "error: --$n must be a whole number above 0 (got '${!n}')" >&2; exit 2; }
done

source runs/environment.sh
cache=$NANOCHAT_BASE_DIR
mkdir -p "$cache/rap"
cache=$(cd "$cache" && pwd)
if [ ${#data[@]} = 0 ]; then
    [ -e "$cache/rap/library.jsonl" ] || python dev/python_library.py "$cache/rap/library.jsonl"
    data=("library=$cache/rap/library.jsonl")
else
    cd "$here" # file names are relative to where the script was started
    export PYTHONSAFEPATH=1 # this folder may hold a statistics.py, which must not be imported
    ! relative "${data[@]}" || folder=$here
fi

source=(--data "${data[@]}")
name="$(printf '%s\n' "${data[@]}" "$steps" ${folder:+"$folder"} | cksum | cut -d' ' -f1)" # a different text or length is a different comparison
export NANOCHAT_BASE_DIR="$cache/rap/$name"
[ -e "$NANOCHAT_BASE_DIR/tokenizer/tokenizer.json" ] || { say "tokenizer"; python -m scripts.tok_train --vocab_size=4096 "${source[@]}"; }
prior="$NANOCHAT_BASE_DIR/rap_prior.safetensors"
if [ ! -e "$prior" ]; then
    say "prior"
    python -m scripts.tok_data "${source[@]}"
    mix=() # the shares of the sources, as the generator takes them
    for one in "${data[@]}"; do [[ "$one" =~ ^([^=]+)=.*:([0-9.]+)(#.*)?$ ]] && mix+=("${BASH_REMATCH[1]}:${BASH_REMATCH[2]}"); done
    # which imports what lies beside it
    PYTHONPATH="$repo/dev:$PYTHONPATH" python "$repo/dev/generate_rap_prior.py" --env "$cache/rap_env" --out "$prior" ${mix[@]:+--mix "${mix[@]}"}
fi

say "training"
same="--depth=3 --model_dim=192 --head_dim=32 --sequence_len=256 --total_batch_size=2048 --num_iterations=$steps --embedding_lr=0.1 --compile=on"
python -m scripts.compare --name rap --names none rap --seeds "$seeds" --common="$same --data $(quoted "${data[@]}")" --a="" --b="--rap=$(quoted "$prior")"
