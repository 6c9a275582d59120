package cgroupsel_test

import (
	"errors"
	"os"
	"os/exec"
	"strconv"
	"testing"
	"time"

	"cgtun/cgroupsel"
	"cgtun/internal/labtest"
	"cgtun/internal/netns"

	"golang.org/x/sys/unix"
)

// Whoever keeps a namespace is counted: processes, sockets that outlive their
// process, mounts, and each descriptor of a tun that was opened inside.
func TestHoldersAreCounted(t *testing.T) {
	labtest.Need(t, labtest.Root, labtest.Tool("ip"))
	holders, err := cgroupsel.OpenHolders()
	if err != nil {
		t.Fatal(err)
	}
	defer holders.Close()
	lab := labtest.New(t)
	p := lab.StartCommand(exec.Command("unshare", "--net", "sleep", "600"))
	path := "/proc/" + strconv.Itoa(p.Pid) + "/ns/net"
	home, _ := os.Readlink("/proc/self/ns/net")
	labtest.Eventually(t, 5*time.Second, func() bool {
		now, err := os.Readlink(path)
		return err == nil && now != home
	}, "it is in a namespace of its own")
	ref, err := netns.Named(path)
	if err != nil {
		t.Fatal(err)
	}
	var queues [2]int
	var sock int
	if err := ref.Do(func() (err error) {
		for i := range queues {
			if queues[i], err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(queues[0])
	defer unix.Close(queues[1])
	want := func(n int, why string) {
		t.Helper()
		labtest.Eventually(t, 5*time.Second, func() bool {
			got, err := holders.Count(uintptr(queues[0]))
			return err == nil && got == n
		}, "%s: want %d holders", why, n)
	}
	want(3, "a process and two tuns")
	if err := ref.Do(func() (err error) {
		sock, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	want(4, "a socket, too")
	mounted := t.TempDir() + "/ns"
	if err := errors.Join(os.WriteFile(mounted, nil, 0o600), unix.Mount(path, mounted, "", unix.MS_BIND, "")); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(mounted, unix.MNT_DETACH)
	want(5, "a mount, too")
	p.Signal(unix.SIGKILL)
	_ = p.Wait()
	want(4, "the process has ended")
	if err := unix.Unmount(mounted, 0); err != nil {
		t.Fatal(err)
	}
	want(3, "the mount has ended")
	unix.Close(sock)
	want(2, "the tuns alone")
}
