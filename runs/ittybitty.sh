#!/usr/bin/env bash
# The 37.75 M parameter model on one GPU: 954 steps of 524,288 tokens (500 M tokens) of web text, then conversations.
# About 1.1 GB of shards are downloaded first. If interrupted, start it again and it continues.
#     bash runs/ittybitty.sh                               the whole run
#     bash runs/ittybitty.sh --dry_run                     prints what the run takes here, and stops
#     bash runs/ittybitty.sh --dry_run --gpu rtx3060       the same for another card
#     WANDB_RUN=name bash runs/ittybitty.sh                also sends curves and settings to Weights & Biases
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export WANDB_RUN="${WANDB_RUN:-dummy}"
source runs/values.sh
planned_run ittybitty.sh --depth=4 --model_dim=512 --head_dim=64 --vocab=24576 --tokens=500170752 --total_batch_size=524288 --data fineweb-edu -- "$@"

python -m nanochat.dataset -n "$shards"
tokenizer_of "$own" ittybitty python -m scripts.tok_train --vocab_size="$vocab" --max_chars=2000000000
python -m scripts.tok_eval
python -m scripts.base_train --depth=4 --model_dim=512 --head_dim=64 --num_iterations=954 --total_batch_size=524288 --target_param_data_ratio=-1 --device_batch_size="$rows" --run="$WANDB_RUN" --model_tag=ittybitty --resume=auto
python -m scripts.base_loss --model_tag=ittybitty
python -m scripts.base_eval --model_tag=ittybitty
python -m scripts.mid_train --model_tag=ittybitty --run="$WANDB_RUN" --resume=auto
python -m scripts.chat_sft --model_tag=ittybitty --run="$WANDB_RUN" --resume=auto
python -m scripts.chat_eval -i sft --model_tag=ittybitty -a all
python -m scripts.chat_cli --model_tag=ittybitty -p "Hello! What can you do?"
