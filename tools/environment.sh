# Sourced by quickstart.sh and test.sh: makes .venv with Python 3.11 once, and again when setup.cfg changes.
# Usage: ensure_environment EXTRA...

ensure_environment() {
    local root extras stamp
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    cd "$root" || return 1
    command -v python3.11 >/dev/null || { echo "python3.11 is needed and was not found; install Python 3.11" >&2; return 2; }
    extras=$(IFS=,; echo "$*")
    stamp=".venv/installed.${extras:-base}.$(sha256sum setup.cfg | cut -c1-16)"
    if [ ! -f "$stamp" ]; then
        echo "installing into .venv (once; torch brings several GB)"
        [ -x .venv/bin/python ] || python3.11 -m venv .venv
        .venv/bin/python -m pip install --quiet --disable-pip-version-check uv
        .venv/bin/uv pip install --quiet --python .venv/bin/python -e ".${extras:+[$extras]}"
        touch "$stamp"
    fi
}
