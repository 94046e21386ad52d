#!/usr/bin/env bash
# Makes the environment if needed and runs the whole pipeline on real handwritten digits, on the CPU.
# Arguments go to tools/quickstart.py (see --help): bash tools/quickstart.sh --out /tmp/quickstart
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
for argument in "$@"; do
    if [ "$argument" = --help ] || [ "$argument" = -h ]; then
        need_python
        PYTHONPATH="$project" exec python3.11 "$project/tools/quickstart.py" --help
    fi
done
ensure_environment
exec "$python" "$project/tools/quickstart.py" "$@"
