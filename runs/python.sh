# Sourced by the other scripts: sets `python` to the name of a Python 3.11 or newer. If there is none, says what to install and exits.
python=""
for candidate in python3.11 python3 python3.12 python3.13 python3.14 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$candidate; break; fi
done
if [ -z "$python" ]; then
    echo "error: Python 3.11 or newer is needed (python3 is $(python3 --version 2>&1)): install python3.11 and its venv module (Debian, Ubuntu: apt install python3.11-venv)" >&2
    exit 2
fi
