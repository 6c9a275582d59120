# make            builds ./cgtun
# sudo make demo  shows what it does, on this machine, and leaves nothing
# sudo make test  runs all tests
# sudo make install  puts program, unit and group where they belong
# CONTRIBUTING.md says when to use the others.

PREFIX  ?= /usr/local
TIME    ?= 30s
BENCH   ?= ./...
PATTERN ?= .
TOOL     = go tool -modfile=internal/tools/go.mod

# Programs of the administrator are not in everybody's PATH, nor is Go in root's.
export PATH := $(PATH):/usr/local/go/bin:/usr/local/sbin:/usr/sbin:/sbin

.PHONY: build test unit demo soak bench bench-compare fuzz lint docs deps install clean

build:
	CGO_ENABLED=0 go build -trimpath -o cgtun ./cmd/cgtun

deps:
	internal/tools/deps.sh

test: deps build
	internal/tools/test.sh
	go run ./internal/demo

unit:
	go test -short ./...

# It has a docker daemon of its own, and installs none.
demo: build
	WITHOUT="docker.io podman buildah docker-registry" internal/tools/deps.sh
	go run ./internal/demo

soak: deps
	CGTUN_SOAK=1 TIMEOUT=0 internal/tools/test.sh

bench: deps
	go test -run '^$$' -bench '$(PATTERN)' -benchmem -p 1 -timeout 60m $(BENCH)
	test "$(BENCH)" != ./... || CGTUN_SOAK=1 go test -count=1 -run '^TestCachedQueriesASecond$$' -v ./cmd/cgtun

bench-compare:
	@test -n "$(BASE)" || { echo "usage: make bench-compare BASE=COMMIT [BENCH=./stack]" >&2; exit 2; }
	internal/tools/bench-compare.sh $(BASE) $(BENCH)

fuzz:
	internal/tools/fuzz.sh $(TIME)

lint:
	@out=$$(gofmt -l $$(git ls-files '*.go')); test -z "$$out" || { echo "not formatted:" $$out >&2; exit 1; }
	go vet ./...
	$(TOOL) staticcheck ./...
	go test -count=1 ./internal/arch
	internal/tools/vuln.sh

docs:
	go test -count=1 ./config ./cmd/cgtun ./internal/arch

# A configuration that is there stays; the service is not enabled. With DESTDIR,
# which is for packagers, nothing of this machine is changed.
install: build
	install -D -m 755 cgtun $(DESTDIR)$(PREFIX)/sbin/cgtun
	install -d -m 755 $(DESTDIR)$(PREFIX)/lib/systemd/system
	sed 's|/usr/local/sbin|$(PREFIX)/sbin|' init/cgtun.service >$(DESTDIR)$(PREFIX)/lib/systemd/system/cgtun.service
ifeq ($(DESTDIR),)
	getent group cgtun >/dev/null || groupadd --system cgtun
	test -e /etc/cgtun/config.toml || $(PREFIX)/sbin/cgtun init
	test ! -d /run/systemd/system || systemctl daemon-reload
else
	install -D -m 644 config.toml.example $(DESTDIR)/etc/cgtun/config.toml
endif

clean:
	rm -f cgtun
	go clean
