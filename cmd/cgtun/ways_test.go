package main

import (
	"encoding/pem"
	"fmt"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"cgtun/config"
)

const someWays = `
[[outbound]]
name = "a"
type = "direct"

[[outbound]]
name = "b"
type = "socks5"
server = "192.0.2.1:1080"
username = "u"
password = "p"
via = "inner"

[[outbound]]
name = "c"
type = "https"
server = "192.0.2.2:443"
tls_ca = %q

[[group]]
name = "inner"
outbounds = ["a"]

[[group]]
name = "outer"
outbounds = ["b", "c"]
`

// TestSameWays: a changed key makes anew what it is of and what leads through
// that; all else stays.
func TestSameWays(t *testing.T) {
	server := httptest.NewTLSServer(nil)
	defer server.Close()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	if err := os.WriteFile(ca, block, 0o600); err != nil {
		t.Fatal(err)
	}
	load := func(old, with string) *config.File {
		t.Helper()
		text := strings.Replace(fmt.Sprintf(someWays, ca), old, with, 1)
		path := filepath.Join(t.TempDir(), "config.toml")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		file, err := config.Load(path, nil)
		if err != nil {
			t.Fatal(err)
		}
		return file
	}
	before := load("", "")
	for _, tc := range []struct{ old, with, stays string }{
		{"", "", "a b c inner outer"},
		{`type = "direct"`, "type = \"direct\"\nmark = 7", "c"},
		{`password = "p"`, `password = "q"`, "a c inner"},
		{`192.0.2.2`, `192.0.2.3`, "a b inner"},
		{`outbounds = ["b", "c"]`, `outbounds = ["c", "b"]`, "a b c inner"},
		{`name = "outer"`, `name = "other"`, "a b c inner"},
	} {
		same := sameWays(load(tc.old, tc.with), before)
		var stays []string
		for _, name := range []string{"a", "b", "c", "inner", "outer"} {
			if same(name) {
				stays = append(stays, name)
			}
		}
		if got := strings.Join(stays, " "); got != tc.stays {
			t.Errorf("%q for %q: %q stay, want %q", tc.with, tc.old, got, tc.stays)
		}
	}
}

// TestWaysAreHandedOverAtAStop: who hands ways over does not wait for who has
// ended.
func TestWaysAreHandedOverAtAStop(t *testing.T) {
	in := &instance{fresh: make(chan *ways, 1)}
	last := &ways{}
	in.hand(&ways{})
	in.hand(last)
	if <-in.fresh != last {
		t.Error("these are not the newest")
	}
}
