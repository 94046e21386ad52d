#!/usr/bin/env bash
# Makes the environment with the test tools if needed, then: format, lint, types, tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
case "${1:-}" in -h | --help) sed -n 's/^# //p' "$0"; exit ;; esac
ensure_environment dev preflight
cd "$project"
export PATH="$project/.venv/bin:$PATH"
ruff format --check .
ruff check .
mypy
python -m pytest "$@"
