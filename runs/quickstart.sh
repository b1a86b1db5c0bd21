#!/usr/bin/env bash
# Trains a small chat model from scratch: environment, tokenizer, attention prior, pretraining, midtraining, finetuning and reinforcement
# learning on the embedded corpus, with an evaluation after each stage.
#     bash runs/quickstart.sh                 12 minutes on two CPU cores, installation included; a GPU is used if there is one
#     bash runs/quickstart.sh --minutes 30    the same with more training
# If interrupted, start it again and it continues. All results are under NANOCHAT_BASE_DIR (default ~/.cache/nanochat).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

minutes=12
while [ $# -gt 0 ]; do
    case "$1" in
        --minutes=*) minutes=${1#*=}; shift ;;
        --minutes) minutes=${2:-}; shift $(($# > 1 ? 2 : 1)) ;;
        -h | --help) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" 2>/dev/null || sed -n '2,6s/^# \{0,1\}//p' runs/quickstart.sh; exit 0 ;;
        *) echo "error: quickstart.sh has no option $1: use --minutes N" >&2; exit 2 ;;
    esac
done
if ! [[ "$minutes" =~ ^[0-9]+$ ]] || [ "$minutes" -lt 3 ]; then
    echo "error: --minutes must be a whole number of at least 3 (got '$minutes')" >&2
    exit 2
fi

source runs/environment.sh

tag=quickstart
[ "$minutes" = 12 ] || tag="quickstart-$minutes"
out="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}/quickstart"
resumable "$out/$minutes-minutes" # this folder also stores how the time is split

step tokenizer python -m scripts.tok_train --data tinyworld --vocab_size=2048

# An attention prior is computed from the training text, so that the model need not discover how to look things up in the context. If its
# environment cannot be created, training works without it, but the model learns more slowly.
prior() {
    python -m scripts.tok_data --data tinyworld || return # set -e has no effect inside a command that `step` runs
    python dev/generate_rap_prior.py --env "$out/../rap_env" --max_lag 256 --out "$out/rap_prior.safetensors" || {
        [ $? != 130 ] || return 130 # interrupted
        echo "notice: the attention prior could not be made (see above): training continues without it"
    }
}
step "attention prior" prior
base_flags=(--model_tag=$tag --resume=auto)
[ ! -e "$out/rap_prior.safetensors" ] || base_flags+=(--rap="$out/rap_prior.safetensors")

# The remaining time goes to the stages. The split is fixed at the first start, so that an interrupted stage keeps its length.
if [ ! -e "$notes/plan" ]; then
    split=$(python -m scripts.plan split --minutes="$minutes" --seconds_used="$SECONDS")
    echo "$split" >"$notes/plan"
fi
source "$notes/plan"

step pretraining python -m scripts.base_train "${base_flags[@]}" --max_minutes="$base" --data tinyworld \
    --depth=4 --model_dim=256 --head_dim=64 --sequence_len=256 --total_batch_size=4096 --embedding_lr=0.05 \
    --warmdown_ratio=1 --eval_tokens=65536 --eval_every=0.2
step "questions to the base model" python -m scripts.chat_eval -i base -g $tag
step midtraining python -m scripts.mid_train --model_tag=$tag --resume=auto --max_minutes="$mid" --data tinyworld@60000:0.6 --text tinyworld:0.4 \
    --total_batch_size=4096 --lr_scale=0.5 --warmdown_ratio=1 --eval_tokens=32768 --eval_every=0.25
step "questions to the midtrained model" python -m scripts.chat_eval -i mid -g $tag
step finetuning python -m scripts.chat_sft --model_tag=$tag --resume=auto --max_minutes="$sft" --data tinyworld@40000 \
    --conversations_per_step=64 --init_lr_frac=0.5 --warmdown_ratio=1 --eval_tokens=32768 --eval_every=0.5
step "questions to the finetuned model" python -m scripts.chat_eval -i sft -g $tag
step reinforcement python -m scripts.chat_rl --model_tag=$tag --resume=auto --max_minutes="$rl" --tasks tinyworld/twostep \
    --questions_per_step=16 --samples=8 --init_lr_frac=0.1 --eval_items=64 --eval_every=0.5
step "questions to the final model" python -m scripts.chat_eval -i rl -g $tag

say "summary"
python -m scripts.summary --model_tag=$tag --out="$out" --seconds=$((before + SECONDS))
cat <<'TALK'

Talk to it:
    source .venv/bin/activate
    python -m scripts.chat_cli
TALK
