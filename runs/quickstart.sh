#!/usr/bin/env bash
# Installs packages into .venv, then trains a small chat model from nothing on generated texts and asks it questions: `nanochat quickstart`.
#     bash runs/quickstart.sh                 12 minutes on two cores of an EPYC (Zen 4), 30 at most; uses a GPU if there is one, unless you add --device_type cpu
#     bash runs/quickstart.sh --minutes 8     stops after 8 minutes, installation included; the model learns less
#     bash runs/quickstart.sh --minutes 30    after a shorter run has ended: trains its model further
# If interrupted, start it again and it continues. All results are under NANOCHAT_BASE_DIR (default ~/.cache/nanochat).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

options=()
while [ $# -gt 0 ]; do
    case "$1" in
        --minutes=* | --target=* | --device_type=*) options+=("$1"); shift ;;
        --minutes | --target | --device_type)
            [ $# -gt 1 ] || { echo "error: $1 needs a value, as in --minutes 12, --target 0.8 or --device_type cpu" >&2; exit 2; }
            options+=("$1=$2"); shift 2 ;;
        -h | --help) sed -n '2,6s/^# \{0,1\}//p' runs/quickstart.sh; exit 0 ;;
        *) echo "error: quickstart.sh has no option $1: use --minutes 12, --target 0.8 or --device_type cpu" >&2; exit 2 ;;
    esac
done
for option in ${options[@]+"${options[@]}"}; do
    if [[ "$option" != --device_type=* ]] && ! [[ "${option#*=}" =~ ^[0-9]+(\.[0-9]+)?$ ]]; then
        echo "error: ${option%%=*} must be a number (got '${option#*=}'): use --minutes 12 or --target 0.8" >&2
        exit 2
    fi
done

source runs/environment.sh

python -m scripts.quickstart --seconds_used="$SECONDS" ${options[@]+"${options[@]}"}
echo "Before these commands, once in every new terminal, run: source .venv/bin/activate"
