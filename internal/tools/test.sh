#!/bin/sh
# Runs all tests, twice: with the race detector and the short forms, then
# without it and whole. Both passes run even if the first fails.
#
# The detector makes a program three times as slow and ten times as large. It finds
# nothing in what starts hundreds of programs one after the other, asks what the
# kernel does with packets, or measures memory: of steer and cgroupsel it sees what
# has goroutines, of cmd/cgtun what has each goroutine of the daemon at work, beside
# flows, changes and a stop.
set -u
cd "$(dirname "$0")/../.."
[ "$(id -u)" -eq 0 ] || { echo "the tests make network namespaces: run sudo make test, or make unit for what needs no root" >&2; exit 1; }

# Nine thousand connections at once want twice as many descriptors, also in the
# programs that the tests start.
ulimit -n "$(ulimit -Hn)"
export CGTUN_TEST_ALL=1 CGTUN_SOAK="${CGTUN_SOAK:-}"
# A program with the detector would wait for a second at its end.
export GORACE=atexit_sleep_ms=0
status=0
# The longest come first, so that no core idles at the end.
packages=$(go list ./steer ./cgroupsel ./attach ./bench/survival ./dialer ./... | grep -v -e '/cmd/cgtun$')
raced=$(echo "$packages" | grep -v -e '/steer$' -e '/cgroupsel$' -e '/bench/survival$' -e '/internal/arch$')
# A bound for what hangs, not for a slow machine. Lint has vetted everything.
common="-count=1 -vet=off -timeout ${TIMEOUT:-30m}"
daemon='Reload|Stop|Several|Labs|ManyNamespaces|TakesItsNamespaceApart|Device|Bulk|Endings|Ping$|Datagrams|Groups|Queries|RulesByName'
daemon="$daemon|FloodOfNames|ManyConnections|OutOfDescriptors|SlowReader|UnusualOpenings|FailingPath|Metrics|WhatIsSaid|RunOf|Systemd"
daemon="$daemon|Scripts|Same|Handed|Cleanup"
kernel='Taken|Instance|Apply|Close|Follow|Held|Snapshot|Lost|Idle|Join|Bounded|Selector|Watch'
crowds='LostRecords|ScopesAre|OwnerIsKilled|FollowsGlobs' # thousands of cgroups, a minute each

echo "== with the race detector, short"
races="env CGO_ENABLED=1 go test -race -short $common"
$races -p 2 $raced || status=1
$races -run "$kernel" -skip "$crowds" ./steer ./cgroupsel &
beside=$!
$races -parallel 4 -run "$daemon" -skip 'Killed|DoNotLeak|Cached|Doctor|SamePort|SameAddresses|SameNumbers' ./cmd/cgtun || status=1
wait $beside || status=1
echo "== without, whole"
go test $common -p 3 $packages || status=1
go test $common -run '^TestDocker$' ./cmd/cgtun & # as long as all others
beside=$!
go test $common -parallel 3 -skip '^TestDocker$' ./cmd/cgtun || status=1
wait $beside || status=1
exit $status
