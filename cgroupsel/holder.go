package cgroupsel

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
)

// holderOf finds a process that has a map open (proc_pid_fdinfo(5)), 0 if none
// that is visible in our pid namespace does. It reads the whole of /proc and is
// for conflicts alone.
func holderOf(id ebpf.MapID) int {
	fds, _ := filepath.Glob("/proc/[0-9]*/fd")
	want := fmt.Sprintf("\nmap_id:\t%d\n", id)
	for _, dir := range fds {
		if !hasOpen(dir, want) {
			continue
		}
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(dir)))
		return pid
	}
	return 0
}

func hasOpen(dir, want string) bool {
	entries, _ := os.ReadDir(dir) // a process that ended meanwhile holds nothing
	for _, e := range entries {
		if to, err := os.Readlink(filepath.Join(dir, e.Name())); err != nil || to != "anon_inode:bpf-map" {
			continue
		}
		info, _ := os.ReadFile(filepath.Join(filepath.Dir(dir), "fdinfo", e.Name()))
		if strings.Contains(string(info), want) {
			return true
		}
	}
	return false
}
