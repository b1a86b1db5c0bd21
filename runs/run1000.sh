#!/usr/bin/env bash
# The depth 32 model (1.9 G parameters, 37.6 G tokens) on a rented node of 8 GPUs with 80 GB: a larger runs/speedrun.sh. To
# estimate hours and memory: `python -m scripts.plan arch --depth 32 --gpu "H100 SXM" --gpus 8 --device_batch_size 8`.
#     bash runs/run1000.sh                     WANDB_RUN and GPUS work as in speedrun.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
DEPTH=32 ROWS=8 SHARDS=800 exec bash runs/speedrun.sh # 180 G characters of web text
