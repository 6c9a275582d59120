package labtest

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// Alone waits until no other test of this machine is alone, in whatever package,
// and lets none be so until the test has ended. It is for tests that kill
// instances, or clean up after them: cleanup takes what is dead on the whole
// machine. To be called before New.
func Alone(t testing.TB) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(os.TempDir(), "cgtun-labtest.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatalf("wait to be alone: %v", err)
	}
	t.Cleanup(func() { f.Close() })
}
