package cgroupsel_test

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"cgtun/cgroupsel"
	"cgtun/internal/labtest"
)

// helperCookies makes a socket of each kind, says the cookies, and waits.
func helperCookies() error {
	var cookies []string
	for i := range kinds {
		fd, err := socketOf(i)
		if err != nil {
			return err
		}
		if kinds[i].connect {
			_ = sendOne(i, fd)
		}
		cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
		if err != nil {
			return err
		}
		cookies = append(cookies, fmt.Sprint(cookie))
	}
	fmt.Println(strings.Join(cookies, " "))
	_, err := os.Stdin.Read(make([]byte, 1))
	return err
}

func (h *helper) cookies() []uint64 {
	h.t.Helper()
	var all []uint64
	for f := range strings.FieldsSeq(h.line()) {
		var c uint64
		if _, err := fmt.Sscan(f, &c); err != nil {
			h.t.Fatal(err)
		}
		all = append(all, c)
	}
	return all
}

// The process of a socket is known by the socket's cookie, as long as it lives.
func TestProcessOfASocketIsKnown(t *testing.T) {
	for _, without := range [][]string{nil, {cgroupsel.FeatureMkdir}} {
		lab, h, _ := newLab(t)
		sel := lab.Cgroup("sel")
		o := options([]string{sel.Path})
		o.Without = without
		s := newSelector(t, o)
		exe, err := os.Readlink("/proc/self/exe")
		if err != nil {
			t.Fatal(err)
		}
		p := startHelper(t, lab, h, sel, "cookies")
		for i, cookie := range p.cookies() {
			pid, program, ok := s.PID(cookie)
			if pid != p.proc.Pid || program != exe || !ok {
				t.Errorf("%s: %d %q %v, want %d %q", kinds[i].name, pid, program, ok, p.proc.Pid, exe)
			}
		}
		other := startHelper(t, lab, h, nil, "cookies")
		for i, cookie := range other.cookies() {
			if pid, program, ok := s.PID(cookie); ok {
				t.Errorf("%s of one that is not selected: %d %q", kinds[i].name, pid, program)
			}
		}
		other.kill()
		p.kill()
		s.Close()
	}
}

// A number that another process has now is no answer.
func TestProcessThatHasEndedIsNotTold(t *testing.T) {
	labtest.Need(t, labtest.Root, labtest.CgroupV2)
	lab := labtest.New(t)
	sel := lab.Cgroup("sel")
	s := newSelector(t, options([]string{sel.Path}))
	conn, err := net.Dial("udp", "127.0.0.1:9")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	raw, err := conn.(*net.UDPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var cookie uint64
	if err := raw.Control(func(fd uintptr) {
		cookie, err = unix.GetsockoptUint64(int(fd), unix.SOL_SOCKET, unix.SO_COOKIE)
	}); err != nil {
		t.Fatal(err)
	}
	sleeper := exec.Command("sleep", "60")
	if err := sleeper.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = sleeper.Process.Signal(syscall.SIGKILL)
		_ = sleeper.Wait()
	}()
	s.SetSender(cookie, sleeper.Process.Pid, 0) // before it began
	if pid, program, ok := s.PID(cookie); ok {
		t.Errorf("the socket is older than process %d (%s), and is said to be its own", pid, program)
	}
	s.SetSender(cookie, sleeper.Process.Pid, 1<<63)
	if pid, program, ok := s.PID(cookie); pid != sleeper.Process.Pid || !strings.HasSuffix(program, "sleep") || !ok {
		t.Errorf("%d %q %v, want the sleeper", pid, program, ok)
	}
}
