#!/usr/bin/env bash
# Runs every check in a fresh environment that is deleted afterwards: lint, format, types, the import ladder and the tests.
#     bash runs/test.sh                 the fast tests
#     bash runs/test.sh -m slow         the slow tests (all other arguments go to pytest; -n 0 runs them in one process)
#     bash runs/test.sh --newest        with the newest packages instead of those in runs/constraints.txt; lists the packages that differ
# Works from any folder. The last line is pytest's summary; the exit status is 0 only if every part passed.
set -uo pipefail
case "${1:-}" in
    -h | --help) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

export LC_CTYPE="${LC_ALL:-${LC_CTYPE:-${LANG:-C}}}" LC_NUMERIC=C LC_COLLATE=C LC_MESSAGES=C # as in runs/environment.sh
unset LC_ALL
source runs/python.sh
newest=""
if [ "${1:-}" = --newest ]; then newest=yes; shift; fi

fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
trap 'exit 130' INT TERM
mkdir "$fresh/tmp"
say() { printf '== %-58s %4ds\n' "$1" "$SECONDS"; }
failed=""
part() { # part NAME COMMAND...: shows the output of the command only if it fails
    say "$1"
    if ! "${@:2}" >"$fresh/log" 2>&1; then cat "$fresh/log"; echo "== FAILED: $1"; failed="$failed $1"; fi
}

say "a fresh environment with $("$python" --version)"
if ! "$python" -m venv "$fresh/venv" >"$fresh/log" 2>&1; then
    tail -3 "$fresh/log" >&2
    echo "error: $python cannot create a virtual environment: install its venv module (Debian: apt install python3.11-venv)" >&2
    exit 2
fi
export PATH="$fresh/venv/bin:$PATH" VIRTUAL_ENV="$fresh/venv" PIP_DISABLE_PIP_VERSION_CHECK=1
say "installing with the test extras (a few minutes)"
pins() { python -m pip install --quiet --no-compile --require-hashes --no-deps -r runs/constraints.txt; }
project() { python -m pip install --quiet --no-compile "$@" -e ".[test]"; }
if [ -n "$newest" ]; then project; else pins && project --no-build-isolation; fi >"$fresh/log" 2>&1 || {
    tail -20 "$fresh/log" >&2
    echo "error: the installation failed (see above): check the network, and whether $(df -h "$fresh" | awk 'NR == 2 { print $4 }') of free disk space are enough" >&2
    exit 1
}
python dev/constraints.py --differences

export OMP_NUM_THREADS=1 # the test models are tiny: two processes with one thread each are faster than one with several
export TMPDIR="$fresh/tmp" NANOCHAT_BASE_DIR="$fresh/base" MPLCONFIGDIR="$fresh/matplotlib" TORCHINDUCTOR_CACHE_DIR="$fresh/inductor"
export PYRIGHT_PYTHON_IGNORE_WARNINGS=1 # pyright would ask the network for a newer version of itself
unset WANDB_RUN RANK WORLD_SIZE LOCAL_RANK

part "lint (ruff)" ruff check .
part "format (ruff)" ruff format --check .
part "types (pyright)" pyright
part "imports (import-linter)" lint-imports --no-cache
say "tests (pytest)"
python -m pytest -m "not slow" -n 2 --dist loadfile "$@" || failed="$failed tests"
[ -z "$failed" ]
