package main

import (
	"bytes"
	"os"
	"strconv"
	"strings"
	"testing"

	"cgtun/internal/labtest"
	"cgtun/internal/netns"
)

// A namespace in which an instance of another's home and one of ours died:
// cleanup, started in ours, takes that away, and nothing else.
//
//	home ("cleanup")      away (cgtun_4242 of home, cgtun_4243 of elsewhere)
func TestCleanupLooksElsewhere(t *testing.T) {
	labtest.Need(t, labtest.Root, labtest.CgroupV2, labtest.Tool("unshare"), labtest.Tool("nft"))
	labtest.Alone(t)
	lab := labtest.New(t)
	home, away, cg := lab.Host("home"), lab.Host("away"), lab.Cgroup("top")
	ref, err := netns.Named(home.Path)
	if err != nil {
		t.Fatal(err)
	}
	mine := "table inet cgtun_4242 { chain " + "home_" + strconv.FormatUint(ref.Cookie(), 10) + " { }; }"
	other := "table inet cgtun_4243 { chain " + "home_12345678" + " { }; }"
	away.Run("nft", mine+"; "+other)
	for _, number := range []string{"4242", "4243"} {
		away.Run("ip", "rule", "add", "fwmark", number, "lookup", number, "priority", "1"+number, "proto", "197")
		away.Run("ip", "route", "add", "unreachable", "default", "metric", "9999", "table", number, "proto", "197")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := cg.Command(home.Command(t.Context(), "unshare", "--cgroup", self, "cleanup", "-s", staleSocket(t)))
	cmd.Env = append(os.Environ(), asProgram+"=1")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("cleanup: %v\n%s", err, &stderr)
	}
	if !strings.Contains(string(out), "removed nft table inet cgtun_4242\n") || strings.Contains(string(out), "4243") {
		t.Errorf("cleanup said:\n%s", out)
	}
	left := away.Run("nft", "list", "ruleset") + away.Run("ip", "rule") + away.Run("ip", "route", "show", "table", "all")
	if strings.Contains(left, "4242") || !strings.Contains(left, "cgtun_4243") || !strings.Contains(left, "lookup 4243") {
		t.Errorf("left:\n%s", left)
	}
	away.Run("nft", "delete table inet cgtun_4243")
	away.Run("ip", "rule", "del", "priority", "14243")
	away.Run("ip", "route", "flush", "table", "4243")
}
