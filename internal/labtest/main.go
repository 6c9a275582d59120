package labtest

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// Main runs a package's tests and then asserts that they left no goroutine, no
// descriptor of a BPF object, tun or namespace, and nothing of cgtun in the
// namespace they were started in. A package's TestMain is this call alone.
//
// Before them it takes away what test processes left that were killed.
func Main(m *testing.M, opts ...goleak.Option) {
	if err := sweep(); err != nil {
		// Another test process may have done it at the same time.
		fmt.Fprintln(os.Stderr, "taking away what a killed test left:", err)
	}
	before := ownResidue()
	code := m.Run()
	if code == 0 {
		// Descriptors go with what holds them, and that ends with the
		// goroutines: first those.
		if err := goleak.Find(opts...); err != nil {
			fmt.Fprintln(os.Stderr, "goroutines left:", err)
			code = 1
		}
		for _, what := range leftOwn(before) {
			fmt.Fprintln(os.Stderr, "left:", what)
			code = 1
		}
	}
	os.Exit(code)
}

// leftOwn returns what is there now and was not before; the kernel may need a
// moment to take something away.
func leftOwn(before []string) (left []string) {
	eventually(2*time.Second, func() bool {
		left = slices.DeleteFunc(ownResidue(), func(s string) bool { return slices.Contains(before, s) })
		return len(left) == 0
	})
	return left
}

// ownResidue lists what this process holds or a cgtun left in its namespace.
func ownResidue() []string {
	all := kernelDescriptors()
	if err := Root.check(); err == nil {
		all = append(all, residue()...)
	}
	return all
}

// kernelDescriptors lists the open descriptors of this process that keep
// something alive in the kernel that outlasts a flow.
func kernelDescriptors() (held []string) {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return nil
	}
	for _, e := range entries {
		to, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err != nil {
			continue
		}
		if strings.HasPrefix(to, "anon_inode:bpf") || strings.HasPrefix(to, "net:[") || to == "/dev/net/tun" || strings.HasPrefix(to, "/run/netns/") {
			held = append(held, "descriptor "+e.Name()+" of "+to)
		}
	}
	return held
}
