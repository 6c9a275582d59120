package main_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"cgtun/internal/labtest"
)

// shout runs a program that is born in a cgroup and whose first act is a
// datagram; the cgroup is made for it and removed after it.
func (w *world) shout(dir, to string) {
	w.t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		w.t.Fatal(err)
	}
	f, err := os.Open(dir)
	if err != nil {
		w.t.Fatal(err)
	}
	defer f.Close()
	// Born of a thread in the machine: nothing selected is ever elsewhere.
	cmd := exec.CommandContext(w.t.Context(), "bash", "-c", "echo first >/dev/udp/"+to)
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(f.Fd())}
	if err := w.machine.Do(cmd.Run); err != nil {
		w.t.Fatalf("datagram: %v", err)
	}
	labtest.Eventually(w.t, patience(), func() bool { return os.Remove(dir) == nil }, "remove "+dir)
}

// Cgroups that globs select come, go and come again: the first datagram of a
// process that is born in one goes through the tun, and none by the uplink.
// Others are left alone.
func TestGlobsCaptureFromTheFirstDatagram(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	got := w.server.MeterMatch("udp dport 7000")
	w.server.ServeUDPEcho(port(far4, 7000))
	w.server.ServeUDPEcho(port(far6, 7000))
	text := strings.Replace(w.config(second), fmt.Sprintf("[%q]", w.sel.Path),
		fmt.Sprintf("[%q, %q, %q]", w.sel.Path, w.sel.Path+"-*/job-*", w.sel.Path+"x/**/leaf"), 1)
	w.start(text)
	rounds := 200
	switch {
	case labtest.Soak():
		rounds = 5000
	case testing.Short():
		rounds = 40
	}
	w.lab.Cgroup("sel-a")
	w.lab.Cgroup("selx/1/2/3/4/5")
	for i := range rounds {
		to := []string{far4, far6}[i/2%2] + "/7000"
		switch i % 4 {
		case 0:
			w.shout(filepath.Join(w.sel.Dir+"-a", "job-again"), to)
		case 1:
			w.shout(filepath.Join(w.sel.Dir+"-a", fmt.Sprint("job-", i)), to)
		case 2:
			w.shout(filepath.Join(w.sel.Dir+"x", "1/2/3/4/5/leaf"), to)
		case 3:
			w.shout(filepath.Join(w.sel.Dir, "child"), to)
		}
	}
	labtest.Eventually(t, patience(), func() bool { return got.Packets() >= uint64(rounds) }, "all datagrams have arrived")
	w.noLeak("selected by globs")
	if n, _ := w.device(); n < uint64(rounds) {
		t.Errorf("%d packets went into the tun, want %d", n, rounds)
	}
	past := w.router.MeterMatch(`iifname "eth0" udp dport 7000`)
	w.shout(filepath.Join(w.sel.Dir+"-a", "jobs"), far4+"/7000")
	if n := past.Packets(); n != 1 {
		t.Errorf("%d datagrams of what no glob selects left by the uplink, want 1", n)
	}
	labtest.Eventually(t, patience(), func() bool { return len(w.status().Cgroups) == 1 }, "status shows what is there")
	job := w.lab.Cgroup("sel-a/job-9")
	labtest.Eventually(t, patience(), func() bool {
		for _, c := range w.status().Cgroups {
			if string(c.Path) == job.Path && uint64(c.ID) == job.ID && c.Present && c.Held {
				return true
			}
		}
		return false
	}, "status shows a cgroup that a glob selects")
}
