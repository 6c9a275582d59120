#!/bin/sh
# Runs all tests, twice: with the race detector and the short forms, then
# without it and whole. Both passes run even if the first fails.
#
# The detector makes a program three times as slow. It finds nothing in what starts
# hundreds of programs one after the other or asks what the kernel does with
# packets: of steer and cgroupsel it sees what has goroutines, of cmd/cgtun it does
# not see what the skipped names say.
set -u
cd "$(dirname "$0")/../.."
[ "$(id -u)" -eq 0 ] || { echo "the tests make network namespaces: run sudo make test, or make unit for what needs no root" >&2; exit 1; }

# Nine thousand connections at once want twice as many descriptors, also in the
# programs that the tests start.
ulimit -n "$(ulimit -Hn)"
export CGTUN_TEST_ALL=1 CGTUN_SOAK="${CGTUN_SOAK:-}"
status=0
echo "== with the race detector, short"
kernel='Closed|Killed[WT]|OwnExit|Doctor|StalledFlows|Moves|StartedInside|Flushed|NoPacket|SocketBound|ResetAtOnce'
kernel="$kernel|KilledClient|Forged|ConnectedPrefixes|HostWithout|OlderSocket|Iperf|RealPrograms|MadeAgain|MadeByHand|OddSockets|OpenIsOpen"
races="CGO_ENABLED=1 go test -race -short -count=1 -p 2 -timeout ${TIMEOUT:-10m}"
env $races $(go list ./... | grep -v -e '/steer$' -e '/cgroupsel$' -e '/cmd/cgtun$') || status=1
env $races -parallel 4 -skip "$kernel" ./cmd/cgtun || status=1
env $races -run 'Taken|Instance|Apply|Close|Follow|Held|Snapshot|Lost|Idle|Join|Bounded|Selector|Watch' ./steer ./cgroupsel || status=1
echo "== without, whole"
go test -count=1 -p 1 -parallel 4 -timeout "${TIMEOUT:-10m}" ./... || status=1
exit $status
