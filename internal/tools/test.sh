#!/bin/sh
# Runs all tests, twice: with the race detector and the short forms, then
# without it and whole. Both passes run even if the first fails.
#
# The detector makes a program three times as slow and ten times as large. It finds
# nothing in what starts hundreds of programs one after the other, asks what the
# kernel does with packets, or measures memory: of steer and cgroupsel it sees what
# has goroutines, of cmd/cgtun it does not see what the skipped names say.
set -u
cd "$(dirname "$0")/../.."
[ "$(id -u)" -eq 0 ] || { echo "the tests make network namespaces: run sudo make test, or make unit for what needs no root" >&2; exit 1; }

# Nine thousand connections at once want twice as many descriptors, also in the
# programs that the tests start.
ulimit -n "$(ulimit -Hn)"
export CGTUN_TEST_ALL=1 CGTUN_SOAK="${CGTUN_SOAK:-}"
status=0
packages=$(go list ./... | grep -v -e '/cmd/cgtun$')
raced=$(echo "$packages" | grep -v -e '/steer$' -e '/cgroupsel$' -e '/bench/survival$')
limit="-timeout ${TIMEOUT:-10m}"
kernel='Closed|Killed[WT]|OwnExit|Doctor|StalledFlows|Moves|StartedInside|Flushed|NoPacket|SocketBound|ResetAtOnce'
kernel="$kernel|KilledClient|Forged|ConnectedPrefixes|HostWithout|OlderSocket|Iperf|MadeAgain|MadeByHand|OddSockets|OpenIsOpen"
kernel="$kernel|EveryMTU|RealPrograms|ProgramsThrough|Frames|RoutersOnThePath|Floods|Docker|CachedQueries"

echo "== with the race detector, short"
races="env CGO_ENABLED=1 go test -race -short -count=1 $limit"
$races -p 2 $raced || status=1
$races -parallel 4 -skip "$kernel" ./cmd/cgtun || status=1
$races -run 'Taken|Instance|Apply|Close|Follow|Held|Snapshot|Lost|Idle|Join|Bounded|Selector|Watch' ./steer ./cgroupsel || status=1
echo "== without, whole"
go test -count=1 $limit -p 2 $packages || status=1
go test -count=1 $limit -parallel 4 ./cmd/cgtun || status=1
exit $status
