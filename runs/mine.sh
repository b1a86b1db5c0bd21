#!/usr/bin/env bash
# Installs packages into .venv, then trains a chat model on your own text, from nothing and without a network: `nanochat mine`.
#     bash runs/mine.sh FOLDER                                     half an hour, installation included
#     bash runs/mine.sh FOLDER --minutes 60                        an hour; takes all flags of nanochat mine, such as --device_type cpu
#     bash runs/mine.sh FOLDER NOTES.txt --hours 8 --name Ada      eight hours, a folder and a file; the model is called Ada
# If interrupted, start it again and it continues. All results are under NANOCHAT_BASE_DIR (default ~/.cache/nanochat).
set -euo pipefail
case "${1:-}" in
    "" | -h | --help) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
esac
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source runs/environment.sh
code=$PWD
cd "$here" # your paths are relative to where you are
export PYTHONSAFEPATH=1 # this folder may hold a statistics.py, which must not be imported
python -m scripts.mine "$@" --seconds_used="$SECONDS"
echo "Before these commands, once in every new terminal, run: source $code/.venv/bin/activate"
