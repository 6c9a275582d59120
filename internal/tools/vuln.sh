#!/bin/sh
# Looks for known weaknesses of the libraries, where the data base of them can
# be reached.
set -u
cd "$(dirname "$0")/../.."
tool="go tool -modfile=internal/tools/go.mod govulncheck"
if ! timeout 60 $tool -version >/dev/null 2>&1; then
	echo "govulncheck: its data base cannot be reached from here: not run"
	exit 0
fi
exec $tool ./...
