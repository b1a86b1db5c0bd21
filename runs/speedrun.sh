#!/usr/bin/env bash
# The depth 20 model (561 M parameters, 11.2 G tokens of web text) on a rented node of 8 GPUs with 80 GB, trained from scratch to a chat model.
# If interrupted, start it again and it continues. The tag of the model is speedrun-d20.
#     bash runs/speedrun.sh                                        the whole run on eight GPUs
#     GPUS=4 bash runs/speedrun.sh                                 on four, with the same total batch
#     bash runs/speedrun.sh --dry_run                              prints what the run takes, and stops
#     bash runs/speedrun.sh --dry_run --gpu rtx4090 --gpus 1       the same for other GPUs
#     WANDB_RUN=name bash runs/speedrun.sh                         also sends curves and settings to Weights & Biases
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
depth="${DEPTH:-20}" tokens="${TOKENS:-11.2e9}" gpus="${GPUS:-8}" script="${SCRIPT:-speedrun.sh}"
tag="${script%.sh}-d$depth" # its own, so that it never continues another run of base_train
common=(--model_tag="$tag" --run="${WANDB_RUN:-dummy}" --resume=auto)
export OMP_NUM_THREADS=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 # after Ctrl+C, torchrun would kill a save that takes more than 30 seconds
source runs/values.sh
planned_run "$script" --depth="$depth" --vocab=65536 --tokens="$tokens" --data fineweb-edu --gpu="H100 SXM" --gpus="$gpus" -- "$@"

python -m nanochat.dataset -n "$shards"
tokenizer_of "$own" "$tag" python -m scripts.tok_train --vocab_size="$vocab" --max_chars=2000000000
python -m scripts.tok_eval

train=(torchrun --standalone --nproc_per_node="$gpus")
"${train[@]}" -m scripts.base_train -- --depth="$depth" --device_batch_size="$rows" "${common[@]}"
"${train[@]}" -m scripts.base_loss -- --model_tag="$tag" --device_batch_size="$rows"
"${train[@]}" -m scripts.base_eval -- --model_tag="$tag" --device_batch_size="$rows"
"${train[@]}" -m scripts.mid_train -- "${common[@]}"
"${train[@]}" -m scripts.chat_sft -- "${common[@]}"
python -m scripts.chat_eval -i mid --model_tag="$tag" -a all # on one GPU, because chat_eval cannot use several
python -m scripts.chat_eval -i sft --model_tag="$tag" -a all
python -m nanochat.report "$tag"
python -m scripts.chat_cli --model_tag="$tag" -p "Why is the sky blue?"
