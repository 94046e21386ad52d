#!/bin/bash
# Runs on each machine of a slice when it boots: fetches a job's code, makes its environment once, and starts what the
# job says. Needs curl, tar and sha256sum; asks Google's metadata server who it is and with what right.
#   start.sh            as a machine of a queued resource: rae_xla.cloud.worker runs the job and comes back after a reboot
#   start.sh COMMAND... in a pod: runs the command in the job's code in place of itself
set -uo pipefail
# What runs at boot may have none, and package managers want one.
export HOME=${HOME:-/root}

metadata() {
    curl -sf --retry 5 --retry-all-errors --max-time 20 -H 'Metadata-Flavor: Google' \
        "http://${GCE_METADATA_HOST:-metadata.google.internal}/computeMetadata/v1/instance/$1"
}
# tpu-env holds lines such as  WORKER_ID: '0'
tpu_env() { metadata attributes/tpu-env | sed -n "s/^$1: *'\{0,1\}\([^']*\)'\{0,1\}$/\1/p"; }

store=${STORAGE_EMULATOR_HOST:-https://storage.googleapis.com}
bucket_of() { local inner=${1#gs://}; echo "${inner%%/*}"; }
object_of() { local inner=${1#gs://}; echo "${inner#*/}" | sed 's/%/%25/g; s/ /%20/g; s/+/%2B/g; s/?/%3F/g; s/#/%23/g; s/&/%26/g; s:/:%2F:g'; }
authorised() {
    local token
    token=$(metadata service-accounts/default/token | sed -n 's/.*"access_token" *: *"\([^"]*\)".*/\1/p')
    # By a file, so that the token is in no list of processes.
    curl -sSf --retry 5 --retry-all-errors --connect-timeout 20 --max-time 600 -K <(echo "header = \"Authorization: Bearer $token\"") "$@"
}
get() { authorised -o "$2" "$store/storage/v1/b/$(bucket_of "$1")/o/$(object_of "$1")?alt=media"; }
put() {
    authorised -o /dev/null -X POST -H 'Content-Type: text/plain' --data-binary "$2" \
        "$store/upload/storage/v1/b/$(bucket_of "$1")/o?uploadType=media&name=$(object_of "$1")"
}

if [ $# -gt 0 ]; then
    job=$RAE_XLA_JOB package=$RAE_XLA_PACKAGE
else
    job=$(metadata attributes/rae-xla-job) package=$(metadata attributes/rae-xla-package)
fi
home=${RAE_XLA_HOME:-/opt/rae_xla}
mkdir -p "$home/code" || exit 1

say() { echo "$(date -u +%FT%TZ) $*" >&2; }
# A machine that cannot start says so where the supervisor looks; what it could not do is in the line.
fail() {
    say "$1"
    local text; text=$(echo "$1" | tr -d '"\\\n' | cut -c1-400)
    [ -z "${worker:-}" ] || put "$job/workers/$worker/setup.json" "{\"time\": $(date +%s), \"failed\": \"$text\"}"
    exit 1
}

if [ $# -eq 0 ]; then
    exec >>"$home/start.log" 2>&1
    node=$(tpu_env NODE_ID) index=$(tpu_env WORKER_ID) worker=""
    [ -n "$job" ] && [ -n "$node" ] && [ -n "$index" ] || fail "the metadata server does not say who this machine is"
    worker="$node-w$index"
    say "worker $worker of $job"
    # One that was left is of no use beside this one; after a reboot its number may be another's.
    old=$(cat "$home/worker.pid" 2>/dev/null)
    if [ -n "$old" ] && tr '\0' ' ' <"/proc/$old/cmdline" 2>/dev/null | grep -q rae_xla.cloud.worker; then
        kill -TERM -- "-$old"
    fi
    put "$job/workers/$worker/setup.json" "{\"time\": $(date +%s), \"phase\": \"installing\"}"
fi

sha256=$(basename "$package" .tar.gz)
code="$home/code/$sha256"
if [ ! -d "$code" ]; then
    get "$package" "$code.tar.gz" || fail "$package cannot be fetched"
    echo "$sha256  $code.tar.gz" | sha256sum -c --quiet || fail "$package is not what its name says"
    rm -rf "$code.partial"
    mkdir "$code.partial" && tar -xzf "$code.tar.gz" -C "$code.partial" && mv "$code.partial" "$code" || fail "$package cannot be unpacked"
fi

if ! command -v python3.11 >/dev/null; then
    python3 -m pip install --quiet uv && python3 -m uv python install --quiet 3.11 &&
        ln -sf "$(python3 -m uv python find 3.11)" /usr/local/bin/python3.11 || fail "Python 3.11 cannot be installed"
fi
log="$home/install.log"
(. "$code/tools/environment.sh" && ensure_environment ${RAE_XLA_EXTRAS-tpu}) >"$log" 2>&1 ||
    fail "the environment cannot be made: $(tail -n 3 "$log" | tr '\n' ' ')"

cd "$code" || exit 1
if [ $# -gt 0 ]; then
    get "$job/recipe.yaml" recipe.yaml || fail "$job/recipe.yaml cannot be fetched"
    exec .venv/bin/python "$@"
fi
setsid nohup bash -c 'until "$@"; do sleep 10; done' until .venv/bin/python -m rae_xla.cloud.worker "$job" "$worker" \
    --home "$home" >>"$home/worker.log" 2>&1 </dev/null &
echo $! >"$home/worker.pid"
say "started"
