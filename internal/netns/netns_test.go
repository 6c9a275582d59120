package netns_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"cgtun/internal/labtest"
	"cgtun/internal/netns"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// space makes a namespace with a dummy name that goes with the test.
func space(t *testing.T, suffix string) string {
	t.Helper()
	labtest.Need(t, labtest.Root, labtest.Tool("ip"))
	name := fmt.Sprintf("nsref%d%s", os.Getpid(), suffix)
	run(t, "ip", "netns", "add", name)
	t.Cleanup(func() { exec.Command("ip", "netns", "del", name).Run() })
	return name
}

func run(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", args, err, out)
	}
	return string(out)
}

func here(t *testing.T) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

func TestDoRunsInsideAndComesBack(t *testing.T) {
	name := space(t, "a")
	ref, err := netns.Named(name)
	if err != nil {
		t.Fatal(err)
	}
	before := here(t)
	if other, err := netns.Named("/run/netns/" + name); err != nil || other.Name() != name || ref.Name() != name {
		t.Errorf("names %q, %q, %v", other.Name(), ref.Name(), err)
	}
	if ref.Inode() == before || ref.IsHome() || ref.String() != name {
		t.Fatalf("ref %v inode %d, here %d", ref, ref.Inode(), before)
	}
	byPath, err := netns.Named("/run/netns/" + name)
	if err != nil || byPath != ref {
		t.Errorf("by path: %v %v, want %v", byPath, err, ref)
	}
	want := errors.New("from inside")
	err = ref.Do(func() error {
		if got := here(t); got != ref.Inode() {
			t.Errorf("inside: inode %d, want %d", got, ref.Inode())
		}
		ifs, err := net.Interfaces()
		if err != nil || len(ifs) != 1 {
			t.Errorf("inside: interfaces %v %v, want only lo", ifs, err)
		}
		return want
	})
	if err != want {
		t.Errorf("error %v, want %v", err, want)
	}
	// Many goroutines on few threads: none may be left behind in there.
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			if err := ref.Do(func() error { runtime.Gosched(); return nil }); err != nil {
				t.Error(err)
			}
			if got := here(t); got != before {
				t.Errorf("afterwards: inode %d, want %d", got, before)
			}
		})
	}
	wg.Wait()
}

func TestHomeIsReachedFromInside(t *testing.T) {
	home, err := netns.Home()
	if err != nil {
		t.Fatal(err)
	}
	if home.Inode() != here(t) || home.Cookie() == 0 || !home.IsHome() || home.String() != "home" {
		t.Fatalf("home %v inode %d cookie %d", home, home.Inode(), home.Cookie())
	}
	direct := 0
	if err := home.Do(func() error { direct = callers(); return nil }); err != nil || direct == 0 {
		t.Errorf("home.Do at home did not run in the caller's goroutine (%v)", err)
	}
	ref, err := netns.Named(space(t, "b"))
	if err != nil {
		t.Fatal(err)
	}
	err = ref.Do(func() error {
		if err := home.Do(func() error {
			if here(t) != home.Inode() {
				t.Error("home.Do inside another namespace is not at home")
			}
			return nil
		}); err != nil {
			return err
		}
		return ref.Do(func() error {
			if here(t) != ref.Inode() || callers() == 0 {
				t.Error("nested Do of the same namespace left it")
			}
			return nil
		})
	})
	if err != nil {
		t.Error(err)
	}
}

// callers says how many frames of this test file are on the stack beside the
// closure itself: 0 in a goroutine of its own.
func callers() int {
	buf := make([]byte, 1<<16)
	return strings.Count(string(buf[:runtime.Stack(buf, false)]), "testing.tRunner") +
		strings.Count(string(buf[:runtime.Stack(buf, false)]), "netns.Ref.Do.func")
}

func TestEndedNamespaceIsGone(t *testing.T) {
	name := space(t, "c")
	ref, err := netns.Named(name)
	if err != nil {
		t.Fatal(err)
	}
	run(t, "ip", "netns", "del", name)
	never := func() error { t.Error("ran"); return nil }
	if err := ref.Do(never); !errors.Is(err, netns.ErrGone) {
		t.Errorf("after deletion: %v, want ErrGone", err)
	}
	run(t, "ip", "netns", "add", name) // the name lives on, the namespace does not
	if err := ref.Do(never); !errors.Is(err, netns.ErrGone) {
		t.Errorf("name used again: %v, want ErrGone", err)
	}
	if err := (netns.Ref{}).Do(never); !errors.Is(err, netns.ErrGone) {
		t.Errorf("zero ref: %v, want ErrGone", err)
	}
}

func TestNamedRefusesWhatIsNoNamespace(t *testing.T) {
	for _, name := range []string{"", ".", "..", "no-such-namespace", "/etc/hostname", "/dev/null", "/proc/self/ns/uts"} {
		if ref, err := netns.Named(name); err == nil {
			t.Errorf("Named(%q) = %v, want an error", name, ref)
		}
	}
}

// A goroutine that ends inside, as by t.FailNow, must not hang its caller nor
// leave a thread behind in the namespace.
func TestGoexitInside(t *testing.T) {
	ref, err := netns.Named(space(t, "d"))
	if err != nil {
		t.Fatal(err)
	}
	before := here(t)
	if err := ref.Do(func() error { runtime.Goexit(); return nil }); err == nil {
		t.Error("no error from a function that never returned")
	}
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			if here(t) != before {
				t.Error("a thread was left in the namespace")
			}
		})
	}
	wg.Wait()
}

// A private namespace is one of its own, has no name, and ends with its closer.
func TestPrivateNamespace(t *testing.T) {
	labtest.Need(t, labtest.Root)
	ref, c, err := netns.Private()
	if err != nil {
		t.Fatal(err)
	}
	before := here(t)
	var inside uint64
	if err := ref.Do(func() error { inside = here(t); return nil }); err != nil {
		t.Fatal(err)
	}
	if inside != ref.Inode() || inside == before || here(t) != before {
		t.Errorf("was in %d, want %d; before %d, now %d", inside, ref.Inode(), before, here(t))
	}
	err = ref.File(func(fd int) error {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil || st.Ino != ref.Inode() || here(t) != before {
			t.Errorf("file of %d, %v, from %d", st.Ino, err, here(t))
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	c.Close()
	if err := ref.Do(func() error { return nil }); !errors.Is(err, netns.ErrGone) {
		t.Errorf("after the end: %v, want ErrGone", err)
	}
}

// A Ref that leads in by another way is still the same namespace, and is gone
// when that way says so.
func TestThroughLeadsToTheSameNamespaceOnly(t *testing.T) {
	a, err := netns.Named(space(t, "c"))
	if err != nil {
		t.Fatal(err)
	}
	other := space(t, "d")
	open := func(name string) func() (int, error) {
		return func() (int, error) { return unix.Open("/run/netns/"+name, unix.O_RDONLY|unix.O_CLOEXEC, 0) }
	}
	same := a.Through(open(a.String()))
	if err := same.Do(func() error { return nil }); err != nil || same.Cookie() != a.Cookie() || same.String() != a.String() {
		t.Errorf("%v, %s", err, same)
	}
	for name, r := range map[string]netns.Ref{"another": a.Through(open(other)), "nothing": a.Through(open("none"))} {
		if err := r.Do(func() error { t.Error("was in " + name); return nil }); !errors.Is(err, netns.ErrGone) {
			t.Errorf("%s: %v, want ErrGone", name, err)
		}
	}
}
