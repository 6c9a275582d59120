package cgroupsel_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"cgtun/cgroupsel"
	"cgtun/internal/labtest"

	"golang.org/x/sys/unix"
)

// helperEnv makes the test binary one of the programs below: they have to be
// processes of their own, as a cgroup holds processes.
const helperEnv = "CGTUN_CGROUPSEL_HELPER"

func TestMain(m *testing.M) {
	var err error
	switch role := os.Getenv(helperEnv); role {
	case "":
		labtest.Main(m)
		return
	case "send":
		err = helperSend()
	case "first":
		err = helperFirst()
	case "open":
		err = helperOpen()
	case "stay":
		err = helperStay()
	case "fork":
		err = helperFork()
	case "sender":
		err = helperSender()
	case "hold":
		err = helperHold()
	case "select":
		err = helperSelect()
	case "cookies":
		err = helperCookies()
	case "frames":
		err = helperFrames()
	case "checks":
		err = helperChecks()
	}
	if err != nil {
		fmt.Println("helper:", err)
		os.Exit(1)
	}
}

// The packets of "send": one of each kind to a port of its own, on loopback,
// where nobody listens.
var kinds = []struct {
	name    string
	typ     int
	to      string
	connect bool
}{
	{"tcp4", unix.SOCK_STREAM, "127.0.0.1:7001", true},
	{"tcp6", unix.SOCK_STREAM, "[::1]:7002", true},
	{"udp4", unix.SOCK_DGRAM, "127.0.0.1:7003", true},
	{"udp6", unix.SOCK_DGRAM, "[::1]:7004", true},
	{"sendto4", unix.SOCK_DGRAM, "127.0.0.1:7005", false},
	{"sendto6", unix.SOCK_DGRAM, "[::1]:7006", false},
}

// helperSend sends one packet of each kind. With the argument "wait" it makes
// its sockets first, says "ready" and sends when it is told to; SEND_MARK is
// put on them.
func helperSend() error {
	fds := make([]int, len(kinds))
	wait := len(os.Args) > 1 && os.Args[1] == "wait"
	for i := range kinds {
		if !wait {
			continue
		}
		fd, err := socketOf(i)
		if err != nil {
			return err
		}
		fds[i] = fd
	}
	if wait {
		fmt.Println("ready")
		if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
			return err
		}
	}
	for i := range kinds {
		fd := fds[i]
		if !wait {
			var err error
			if fd, err = socketOf(i); err != nil {
				return err
			}
		}
		if err := sendOne(i, fd); err != nil {
			return fmt.Errorf("%s: %w", kinds[i].name, err)
		}
	}
	return nil
}

func socketOf(i int) (int, error) {
	family := unix.AF_INET
	if strings.HasSuffix(kinds[i].name, "6") {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, kinds[i].typ|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	var mark int
	if fmt.Sscan(os.Getenv("SEND_MARK"), &mark); mark != 0 {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, mark)
	}
	return fd, err
}

func sendOne(i, fd int) error {
	addr, err := net.ResolveTCPAddr("tcp", kinds[i].to)
	if err != nil {
		return err
	}
	var to unix.Sockaddr
	if v4 := addr.IP.To4(); v4 != nil {
		to = &unix.SockaddrInet4{Port: addr.Port, Addr: [4]byte(v4)}
	} else {
		to = &unix.SockaddrInet6{Port: addr.Port, Addr: [16]byte(addr.IP)}
	}
	if kinds[i].typ == unix.SOCK_STREAM {
		if err := unix.Connect(fd, to); err != unix.ECONNREFUSED {
			return fmt.Errorf("connect: %v, want refused", err)
		}
		return nil
	}
	if kinds[i].connect {
		if err := unix.Connect(fd, to); err != nil {
			return err
		}
		to = nil
	}
	return unix.Sendto(fd, []byte("x"), 0, to)
}

// told is what "select" says in one line when it is ready.
type told struct {
	Cgroups []cgroupsel.Cgroup
	Self    cgroupsel.Cgroup
	IsSelf  bool
	Error   string
	Missing []string // features
	Path    string   // PathByID of the first cgroup
	// Namespaces are names.
	Namespaces []string
}

// helperSelect makes a selector from the options in its first argument, says
// what it sees, and then does what it is told, a line each: "send", "end".
func helperSelect() error {
	var o cgroupsel.Options
	if err := json.Unmarshal([]byte(os.Args[1]), &o); err != nil {
		return err
	}
	s, err := cgroupsel.New(o)
	if err != nil {
		return err
	}
	say := told{Cgroups: s.Snapshot().Cgroups}
	say.Self, say.IsSelf = s.Self()
	for _, n := range s.Snapshot().Namespaces {
		say.Namespaces = append(say.Namespaces, n.Ref.String())
	}
	for _, f := range s.Features() {
		if f.Err != nil {
			say.Error += f.Err.Error() + "\n"
			say.Missing = append(say.Missing, f.Name)
		}
	}
	if len(say.Cgroups) > 0 {
		say.Path, _ = s.PathByID(say.Cgroups[0].ID)
	}
	text, err := json.Marshal(say)
	if err != nil {
		return err
	}
	fmt.Println(string(text))
	for in := bufio.NewScanner(os.Stdin); in.Scan() && in.Text() != "end"; {
		if err := helperSend(); err != nil {
			fmt.Println("send:", err)
		}
		fmt.Println("sent")
	}
	return s.Close()
}

// helperEnviron makes the test binary a role. A race detector waits a second at
// each end of a process by default: there are hundreds here.
func helperEnviron(role string) []string {
	return append(os.Environ(), helperEnv+"="+role, "GORACE=atexit_sleep_ms=0")
}

// helper is one of these programs, running.
type helper struct {
	t     *testing.T
	proc  *labtest.Proc
	stdin *os.File
	lines *bufio.Reader
}

// startHelper runs a role: in the namespace of h, in the cgroup c if that is
// not nil, behind the words of before ("ip", "netns", …).
func startHelper(t *testing.T, lab *labtest.Lab, h *labtest.Host, c *labtest.Cgroup, role string, args ...string) *helper {
	t.Helper()
	return startBehind(t, lab, h, c, nil, role, args...)
}

func startBehind(t *testing.T, lab *labtest.Lab, h *labtest.Host, c *labtest.Cgroup, before []string, role string, args ...string) *helper {
	t.Helper()
	words := append(append(append([]string{}, before...), self(t)), args...)
	return startCommand(t, lab, h.Command(t.Context(), words[0], words[1:]...), c, role)
}

// startCommand runs a command that becomes a role, in the cgroup c if that is
// not nil.
func startCommand(t *testing.T, lab *labtest.Lab, cmd *exec.Cmd, c *labtest.Cgroup, role string) *helper {
	t.Helper()
	cmd.Env = helperEnviron(role)
	inR, inW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	outR, outW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdin, cmd.Stdout = inR, outW
	if c != nil {
		c.Command(cmd)
	}
	p := lab.StartCommand(cmd)
	inR.Close()
	outW.Close()
	t.Cleanup(func() { inW.Close(); outR.Close() })
	return &helper{t: t, proc: p, stdin: inW, lines: bufio.NewReader(outR)}
}

func (h *helper) line() string {
	h.t.Helper()
	s, err := h.lines.ReadString('\n')
	if err != nil {
		h.t.Fatalf("read from helper: %v; it said %q", err, s)
	}
	return strings.TrimSpace(s)
}

func (h *helper) tell(what string) {
	h.t.Helper()
	if _, err := fmt.Fprintln(h.stdin, what); err != nil {
		h.t.Fatal(err)
	}
}

func (h *helper) wait() {
	h.t.Helper()
	if err := h.proc.Wait(); err != nil {
		h.t.Fatalf("helper: %v: %s", err, h.proc.Output())
	}
}

func (h *helper) told() told {
	h.t.Helper()
	var say told
	line := h.line()
	if err := json.Unmarshal([]byte(line), &say); err != nil {
		h.t.Fatalf("helper said %q", line)
	}
	return say
}

func (h *helper) kill() {
	h.proc.Signal(syscall.SIGKILL)
	_ = h.proc.Wait()
}
