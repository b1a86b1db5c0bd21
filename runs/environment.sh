# Sourced by the other scripts: makes the environment .venv with everything in it, or finds it, and activates it; defines `say`, and for
# scripts that go on where they were interrupted `resumable FOLDER` and `step`.
say() { printf '\n== %s  [%d:%02d]\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }

say "environment"
if [ ! -x .venv/bin/python ]; then
    source runs/python.sh
    "$python" -m venv .venv || { rm -rf .venv; echo "error: $python cannot make a virtual environment: install its venv module" >&2; exit 2; }
fi
source .venv/bin/activate
if ! cmp -s pyproject.toml .venv/installed; then
    echo "installing (a minute or two)"
    PIP_DISABLE_PIP_VERSION_CHECK=1 python -m pip install --quiet -e . 2>.venv/pip.log || {
        tail -5 .venv/pip.log >&2
        echo "error: the installation failed (see above): check that the package index can be reached, then start this again" >&2
        exit 2
    }
    cp pyproject.toml .venv/installed
fi

resumable() { # resumable FOLDER: notes what is done there; $before: the seconds of earlier, interrupted starts
    notes=$1
    mkdir -p "$notes"
    before=$(cat "$notes/seconds" 2>/dev/null || echo 0)
    trap 'echo $((before + SECONDS)) >"$notes/seconds"' EXIT
}
step() { # step NAME COMMAND...: once; what is done stays done
    [ -e "$notes/$1.done" ] && return
    say "$1"
    "${@:2}" || return
    touch "$notes/$1.done"
}
