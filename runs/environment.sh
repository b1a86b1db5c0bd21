# Sourced by the other scripts: creates the virtual environment .venv with all dependencies if needed, and activates it. Defines `say`,
# and `resumable FOLDER` and `step` for scripts that continue where they were interrupted.
# In every language, numbers have a decimal point and names are sorted alike; the character set stays that of the terminal.
export LC_CTYPE="${LC_ALL:-${LC_CTYPE:-${LANG:-C}}}" LC_NUMERIC=C LC_COLLATE=C LC_MESSAGES=C
unset LC_ALL
# Python expands a quoted ~ at the beginning, so the scripts do, too
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
case "$NANOCHAT_BASE_DIR" in '~' | '~/'*) NANOCHAT_BASE_DIR="$HOME${NANOCHAT_BASE_DIR#?}" ;; esac
say() { printf '\n== %s  [%d:%02d]\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }

say "environment"
[ ! -e .venv/home ] || [ "$(cat .venv/home)" = "$(pwd -P)" ] || rm -rf .venv # it was made in another folder, and holds paths of that one
# Packages belong to one minor version of Python: where that is gone, or the system has replaced it by another, they are installed anew
if [ -e .venv/pyvenv.cfg ]; then
    version=$(.venv/bin/python -V 2>/dev/null) && version=${version#* } && compgen -G ".venv/lib/python${version%.*}*" >/dev/null || rm -rf .venv
fi
if [ ! -x .venv/bin/python ] || [ ! -e .venv/bin/activate ]; then
    source runs/python.sh
    "$python" -m venv .venv || { rm -rf .venv; echo "error: $python cannot create a virtual environment: install its venv module (Debian, Ubuntu: apt install python3-venv), then run this script again" >&2; exit 2; }
fi
source .venv/bin/activate
[ "$(command -v python)" != "$PWD/.venv/bin/python" ] || pwd -P >.venv/home
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" # `python -m scripts.NAME` also works where the user's files are
needed() { cat pyproject.toml runs/constraints.txt; python -V | cut -d. -f1,2; }
if [ ! -e .venv/installed ] || ! needed | cmp -s - .venv/installed; then
    echo "installing packages into .venv (takes a minute or two on a fast network; the largest package is PyTorch)"
    pinned=.venv/pinned.txt
    sed '/^# for the tests/q' runs/constraints.txt >"$pinned"
    # Everything but torch has the versions and hashes of runs/constraints.txt. uv is faster, and takes torch without CUDA where there is
    # no GPU; where it is missing or fails, pip installs. Python compiles what is imported; to compile everything first takes nearly half of pip's time.
    {
        uv pip install --quiet --require-hashes --no-deps -r "$pinned" &&
            uv pip install --quiet --torch-backend=auto --no-build-isolation -e ".[serve,documents]"
    } 2>.venv/uv.log || {
        export PIP_DISABLE_PIP_VERSION_CHECK=1
        python -m pip install --quiet --no-compile --require-hashes --no-deps -r "$pinned" &&
            python -m pip install --quiet --no-compile --no-build-isolation -e ".[serve,documents]"
    } 2>.venv/pip.log || {
        tail -5 .venv/pip.log >&2
        echo "error: the installation failed (see above): check the network and the free disk space, then run this script again" >&2
        exit 2
    }
    needed >.venv/installed
fi

resumable() { # resumable FOLDER: records finished steps there; $before is the number of seconds that earlier, interrupted starts took
    notes=$1
    mkdir -p "$notes"
    before=$(cat "$notes/seconds" 2>/dev/null || echo 0)
    trap 'echo $((before + SECONDS)) >"$notes/seconds"' EXIT
}
step() { # step NAME COMMAND...: runs the command unless it has succeeded before
    [ -e "$notes/$1.done" ] && return
    say "$1"
    "${@:2}" || return
    touch "$notes/$1.done"
    echo $((before + SECONDS)) >"$notes/seconds"
}
tokenizer_of() { # tokenizer_of FILE TAG COMMAND...: trains a tokenizer with the command and writes its fingerprint to FILE. Does nothing if that
    # tokenizer is still there or was moved aside, or if the run TAG has begun, which keeps its own
    local steps=("$NANOCHAT_BASE_DIR/checkpoints/base/$2"/step_*)
    [ ! -e "${steps[0]}" ] || return 0
    [ ! -e "$1" ] || ! python -c "import sys; from nanochat.commands.tok_train import restore; sys.exit(not restore(sys.argv[1]))" "$(cat "$1")" || return 0
    say tokenizer
    "${@:3}" || return
    python -c "from nanochat.data.tokenizer import Tokenizer; print(Tokenizer.load().fingerprint)" >"$1"
}
