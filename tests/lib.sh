# What every step of tests/steps sources: `ok` and `fail`, and a directory that goes away.
# shellcheck shell=bash
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
rig=$root/tests/rig/rig
work=$(mktemp -d /tmp/coffer-step-XXXXXX)
trap 'rm -rf "$work"' EXIT
trap 'echo "FAILED: line $LINENO: $BASH_COMMAND"' ERR
cd "$root"

ok() { echo "ok: $*"; }
fail() {
    echo "FAILED: $*"
    exit 1
}
# The step cannot run here: exit code 77, with the reason.
skip() {
    echo "skipped: $*"
    exit 77
}
# long WHY: only when asked for, since it takes long the first time.
long() { [ -n "${COFFER_TEST_LONG:-}" ] || skip "$*: COFFER_TEST_LONG=1 runs it"; }
# same WHAT WANTED GOT
same() {
    [ "$2" = "$3" ] || fail "$1: wanted \`$2\`, got \`$3\`"
    ok "$1: $3"
}
# fuzz FOLDER PROGRAM SECONDS: each target of a crate of fuzz targets for so long. The crate is a workspace of its own, built here with the
# development profile of this one: checked arithmetic, and nearly all that it depends on is built already. Long runs use tests/fuzz/build.
fuzz() {
    export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$root/target}
    cargo build -q --config Cargo.toml --manifest-path "$1/Cargo.toml"
    "$CARGO_TARGET_DIR/debug/$2" all --seconds "$3" --seed $RANDOM
}
