#!/bin/sh
# Runs all tests, twice: with the race detector and the short forms, then
# without it and whole. Both passes run even if the first fails.
#
# The detector makes a program three times as slow and ten times as large. It finds
# nothing in what starts hundreds of programs one after the other, asks what the
# kernel does with packets, or measures memory. So of steer, cgroupsel and cmd/cgtun
# it sees what has goroutines at work beside flows, changes and a stop: who adds such
# a test sees to it that one of the patterns below matches its name.
set -u
cd "$(dirname "$0")/../.."
[ "$(id -u)" -eq 0 ] || { echo "the tests make network namespaces: run sudo make test, or make unit for what needs no root" >&2; exit 1; }

kernel='Taken|Instance|Apply|Close|Follow|Held|Snapshot|Lost|Idle|Join|Bounded|Selector|Watch'
# A minute each with the detector; and one that clean-ups of others disturb.
not_kernel='LostRecords|ScopesAre|OwnerIsKilled|FollowsGlobs|TakenOverIsNotCleanedUp'
daemon='Reload|Stop|Several|Labs|ManyNamespaces|NamespacesEnd|ChangesOf|TakesItsNamespaceApart|Device|Bulk|Endings|Ping$|Datagrams|Groups'
daemon="$daemon|Queries|RulesByName|FloodOfNames|ManyConnections|OutOfDescriptors|SlowReader|UnusualOpenings|FailingPath|Metrics|WhatIsSaid"
daemon="$daemon|RunOf|Systemd|Scripts|Same|Handed|Cleanup|BadFiles"
not_daemon='Killed|Cached|Doctor|SamePort|SameAddresses|SameNumbers'

# Nine thousand connections at once want twice as many descriptors, also in the
# programs that the tests start.
ulimit -n "$(ulimit -Hn)"
export CGTUN_TEST_ALL=1 CGTUN_SOAK="${CGTUN_SOAK:-}"
# A program with the detector would wait for a second at its end.
export GORACE="atexit_sleep_ms=0 ${GORACE:-}"
# The longest come first, so that no core idles at the end.
all=$(go list ./steer ./cgroupsel ./attach ./bench/survival ./dialer ./...) || exit 1
packages=$(echo "$all" | grep -v -e '/cmd/cgtun$')
raced=$(echo "$packages" | grep -v -e '/steer$' -e '/cgroupsel$' -e '/bench/survival$' -e '/internal/arch$')
# The time is a bound for what hangs, not for a slow machine. make lint has vetted.
common="-count=1 -vet=off -timeout ${TIMEOUT:-30m}"
races="env CGO_ENABLED=1 go test -race -short $common"
status=0

# beside runs a command beside the next ones, but in a soak, which measures; done_beside
# waits for it.
beside=
beside() {
	if [ "$CGTUN_SOAK" = 1 ]; then
		"$@" || status=1
	else
		"$@" &
		beside=$!
	fi
}
done_beside() {
	[ -z "$beside" ] || wait "$beside" || status=1
	beside=
}
trap '[ -z "$beside" ] || { pkill -P "$beside"; kill "$beside"; }; exit 1' INT TERM

echo "== with the race detector, short"
$races -p 2 $raced || status=1
beside $races -run "$kernel" -skip "$not_kernel" ./steer ./cgroupsel
$races -parallel 4 -run "$daemon" -skip "$not_daemon" ./cmd/cgtun || status=1
done_beside
echo "== without, whole"
go test $common -p 3 $packages || status=1
beside go test $common -run '^TestDocker$' ./cmd/cgtun # as long as all others
go test $common -parallel 3 -skip '^TestDocker$' ./cmd/cgtun || status=1
done_beside
exit $status
