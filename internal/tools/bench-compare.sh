#!/bin/sh
# Runs the benchmarks of a commit and of the tree as it is, and compares them:
# bench-compare.sh BASE PACKAGE…
set -eu
cd "$(dirname "$0")/../.."
base=$1
shift
work=$(mktemp -d)
trap 'git worktree remove --force "$work/base" >/dev/null 2>&1 || true; rm -rf "$work"' EXIT
git worktree add --quiet --detach "$work/base" "$base"
count=${COUNT:-6}
(cd "$work/base" && go test -run '^$' -bench . -benchmem -count "$count" -timeout 0 "$@") >"$work/old.txt"
go test -run '^$' -bench . -benchmem -count "$count" -timeout 0 "$@" >"$work/new.txt"
go tool -modfile=internal/tools/go.mod benchstat "old=$work/old.txt" "new=$work/new.txt"
