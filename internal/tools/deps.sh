#!/bin/sh
# Installs the Debian packages of the programs that tests and the demo use and
# that are not there. Does nothing, and needs no root, where all of them are.
# Go itself is not among them, nor are the packages in WITHOUT.
set -eu
list=$(dirname "$0")/../labtest/tools.txt

# Programs of the administrator are not in everybody's PATH.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

missing=
while read -r tool package rest; do
	case $tool in '' | '#'*) continue ;; esac
	case " ${WITHOUT:-} " in *" $package "*) continue ;; esac
	command -v "$tool" >/dev/null 2>&1 || missing="$missing $package"
done <"$list"
# The race detector is C: the compiler alone does not do.
[ -e /usr/include/stdlib.h ] || missing="$missing libc6-dev"
# nft prints protocols by the names that are in there.
[ -e /etc/protocols ] || missing="$missing netbase"
[ -n "$missing" ] || exit 0

missing=$(printf '%s\n' $missing | sort -u | tr '\n' ' ')
echo "installing: $missing"
if ! command -v apt-get >/dev/null; then
	echo "no apt-get here: install these packages, or what your system calls them, by hand" >&2
	exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
	echo "installing needs root: sudo make test, or sudo apt-get install $missing" >&2
	exit 1
fi
export DEBIAN_FRONTEND=noninteractive
# Servers that start by themselves are not wanted: the tests run their own.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
	printf '#!/bin/sh\nexit 101\n' >"$policy"
	chmod 755 "$policy"
	trap 'rm -f "$policy"' EXIT
fi
apt-get -qq update
# shellcheck disable=SC2086
apt-get -qq install --no-install-recommends -y $missing >/dev/null
