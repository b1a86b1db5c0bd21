#!/usr/bin/env bash
# The first ten minutes on a card: is everything right, and how fast is it? Ends with a table of passes and failures.
#     bash bench/gpu_first.sh                             on the first CUDA device
#     bash bench/gpu_first.sh --parts card golden         some of its parts
#     bash bench/gpu_first.sh --device cpu --tiny         its whole logic on a CPU, in a minute
# Each part runs in a process of its own with a time limit, and leaves PART.json and PART.log in --out. The exit status is 0 only if all passed.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-0}"
exec python -m bench.gpu_first "$@"
