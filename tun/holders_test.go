package tun_test

import (
	"errors"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"cgtun/internal/labtest"
	"cgtun/internal/netns"
	"cgtun/tun"

	"golang.org/x/sys/unix"
)

// Whoever keeps a namespace is counted: processes, sockets that outlive their
// process, mounts, and each queue of ours.
func TestHoldersAreCounted(t *testing.T) {
	labtest.Need(t, labtest.Root, labtest.Tool("ip"))
	holders, err := tun.OpenHolders()
	if err != nil {
		t.Fatal(err)
	}
	defer holders.Close()
	lab := labtest.New(t)
	far := lab.Host("far")
	p := lab.StartCommand(exec.Command("unshare", "--net", "sleep", "600"))
	path := "/proc/" + strconv.Itoa(p.Pid) + "/ns/net"
	home, _ := os.Readlink("/proc/self/ns/net")
	labtest.Eventually(t, 5*time.Second, func() bool {
		now, err := os.Readlink(path)
		return err == nil && now != home
	}, "it is in a namespace of its own")
	far.Run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1", "netns", strconv.Itoa(p.Pid))
	ref, err := netns.Named(path)
	if err != nil {
		t.Fatal(err)
	}
	d := open(t, ref, tun.Options{Table: 101, Queues: 2})
	want := func(n int, why string) {
		t.Helper()
		labtest.Eventually(t, 5*time.Second, func() bool {
			got, err := d.Holders(holders)
			return err == nil && got == n
		}, "%s: want %d holders", why, n)
	}
	want(3, "a process and two queues")
	var sock int
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
	want(2, "the queues alone")

	// Then it ends when they do, and that is what their readers hear.
	read := make(chan error, 1)
	go func() {
		_, _, err := d.Queues()[0].ReadPacket([][]byte{make([]byte, 2000)})
		read <- err
	}()
	if err := d.LetGo(); err != nil {
		t.Error(err)
	}
	if err := <-read; !errors.Is(err, netns.ErrGone) {
		t.Errorf("the reader heard %v", err)
	}
	if n, err := d.Holders(holders); err == nil {
		t.Errorf("%d holders afterwards", n)
	}
	labtest.Eventually(t, 5*time.Second, func() bool { return !strings.Contains(far.Run("ip", "link"), "eth0") }, "the other end of its veth goes with it")
}
