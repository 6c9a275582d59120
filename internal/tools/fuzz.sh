#!/bin/bash
# Runs each fuzz target of the project for a time: fuzz.sh 30s
set -euo pipefail
cd "$(dirname "$0")/../.."

# one PACKAGE TARGET TIME. On a loaded machine go test may fail for no more than that
# the time is over (golang/go#75804): a failure of the target always names its input.
one() {
	local out
	out=$(mktemp)
	trap 'rm -f "$out"' RETURN
	go test -run '^$' -fuzz "^$2\$" -fuzztime "$3" "./$1" 2>&1 | tee "$out" && return
	grep -qx ' *context deadline exceeded' "$out" && ! grep -q 'Failing input' "$out"
}

for dir in $(git grep -l '^func Fuzz' -- '*_test.go' | xargs -r -n1 dirname | sort -u); do
	for target in $(grep -ho '^func Fuzz[A-Za-z0-9_]*' "$dir"/*_test.go | cut -c6-); do
		echo "== $dir $target"
		one "$dir" "$target" "$1"
	done
done
