#!/bin/sh
# Runs all tests, twice: with the race detector and the short forms, then
# without it and whole. Both passes run even if the first fails.
#
# Most lab tests of steer and cgroupsel start hundreds of programs one after the
# other, which takes minutes with the detector and finds no race: of these two it
# sees what has goroutines.
set -u
cd "$(dirname "$0")/../.."
[ "$(id -u)" -eq 0 ] || { echo "the tests make network namespaces: run sudo make test, or make unit for what needs no root" >&2; exit 1; }

# Nine thousand connections at once want twice as many descriptors, also in the
# programs that the tests start.
ulimit -n "$(ulimit -Hn)"
export CGTUN_TEST_ALL=1 CGTUN_SOAK="${CGTUN_SOAK:-}"
status=0
echo "== with the race detector, short"
races="CGO_ENABLED=1 go test -race -short -count=1 -p 2 -timeout ${TIMEOUT:-10m}"
env $races $(go list ./... | grep -v -e '/steer$' -e '/cgroupsel$') || status=1
env $races -run 'Taken|Instance|Apply|Close|Follow|Held|Snapshot|Lost|Idle|Join|Bounded|Selector|Watch' ./steer ./cgroupsel || status=1
echo "== without, whole"
go test -count=1 -p 1 -timeout "${TIMEOUT:-10m}" ./... || status=1
exit $status
