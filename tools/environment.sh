# Sourced by quickstart.sh and test.sh: makes .venv with Python 3.11 once, and again when setup.cfg changes.
# Usage: ensure_environment EXTRA...   Sets $project to the project's folder and $python to its Python.

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python="$project/.venv/bin/python"

need_python() {
    command -v python3.11 >/dev/null || { echo "python3.11 is needed and was not found; install Python 3.11" >&2; return 2; }
}

ensure_environment() (
    cd "$project" || return 1
    need_python || return 2
    extras=$(IFS=,; echo "$*")
    stamp=".venv/installed.${extras:-base}.$(sha256sum setup.cfg | cut -c1-16)"
    if [ ! -f "$stamp" ]; then
        echo "installing into .venv (once; torch brings several GB)"
        # An interrupted start may have left a Python without pip.
        "$python" -m pip --version >/dev/null 2>&1 || python3.11 -m venv --clear .venv
        # One chain: where errors do not end a script, a failed installation would count as made.
        "$python" -m pip install --quiet --disable-pip-version-check uv &&
            .venv/bin/uv pip install --quiet --python "$python" -e ".${extras:+[$extras]}" &&
            touch "$stamp"
    fi
)
