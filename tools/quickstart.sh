#!/usr/bin/env bash
# Makes the environment if needed and runs the whole pipeline on real handwritten digits, on the CPU.
# Arguments go to tools/quickstart.py (see --help): bash tools/quickstart.sh --out /tmp/quickstart
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment
exec .venv/bin/python tools/quickstart.py "$@"
