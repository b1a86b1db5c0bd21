#!/usr/bin/env bash
# The depth 32 model (1.9 G parameters, 37.6 G tokens of web text) on a rented node of 8 GPUs with 80 GB: a larger runs/speedrun.sh.
# If interrupted, start it again and it continues. The tag of the model is run1000-d32. WANDB_RUN, GPUS and --dry_run work as in speedrun.sh.
#     bash runs/run1000.sh                                         the whole run on eight GPUs
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SCRIPT=run1000.sh DEPTH=32 TOKENS=37.6e9 exec bash runs/speedrun.sh "$@"
