package control_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"cgtun/control"
	"cgtun/flow"
	"cgtun/internal/labtest"
)

// childEnv makes the test binary a client: its value is "SOCKET COMMAND".
const childEnv = "CGTUN_CONTROL_CHILD"

// child asks as another user would, prints what it was told, and exits.
func child() int {
	sock, command, _ := strings.Cut(os.Getenv(childEnv), " ")
	c := control.Client{Socket: sock}
	var err error
	switch command {
	case "status":
		_, _, err = c.Status(context.Background())
	case "reload":
		err = c.Reload(context.Background())
	case "join":
		err = c.Join(context.Background(), "", false)
	case "direct":
		err = c.Join(context.Background(), "", true)
	}
	if err != nil {
		fmt.Print(err)
		return 1
	}
	fmt.Print("ok")
	if command == "join" {
		own, _ := os.ReadFile("/proc/self/cgroup")
		fmt.Printf(", in\n%s", own)
	}
	return 0
}

// as runs child as another user.
func as(t *testing.T, cred *syscall.Credential, c control.Client, command string) string {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"="+c.Socket+" "+command)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: cred}
	out, _ := cmd.CombinedOutput()
	return string(out)
}

// A socket that anybody can connect to still asks who it is: the mode of the
// file is not the only guard.
func TestUsersAreToldApart(t *testing.T) {
	labtest.Need(t, labtest.Root)
	const member, stranger = 1, 65534 // daemon and nogroup, everywhere on Debian
	source := &fake{emit: make(chan func(flow.Event), 1)}
	_, c := serve(t, control.Options{Group: "daemon", Source: source})
	if err := os.Chmod(filepath.Dir(c.Socket), 0o755); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(c.Socket); err != nil || st.Mode().Perm() != 0o660 || st.Sys().(*syscall.Stat_t).Gid != member {
		t.Errorf("the socket is not 0660 root:daemon: %v, %v", st, err)
	}
	nobody := &syscall.Credential{Uid: stranger, Gid: stranger}
	if got := as(t, nobody, c, "status"); !strings.Contains(got, "needs root or group cgtun") {
		t.Errorf("the mode lets a stranger in: %q", got)
	}
	if err := os.Chmod(c.Socket, 0o666); err != nil {
		t.Fatal(err)
	}
	const refused = "needs root or group daemon"
	tests := []struct {
		who     string
		cred    *syscall.Credential
		command string
		want    string
	}{
		{"stranger", nobody, "status", refused},
		{"stranger", nobody, "join", refused},
		{"member", &syscall.Credential{Uid: stranger, Gid: member}, "status", "ok"},
		{"supplementary member", &syscall.Credential{Uid: stranger, Gid: stranger, Groups: []uint32{7, member}}, "status", "ok"},
		{"member", &syscall.Credential{Uid: stranger, Gid: member}, "join", "ok"},
		{"member", &syscall.Credential{Uid: stranger, Gid: member}, "direct", "run -direct needs root"},
		{"member", &syscall.Credential{Uid: stranger, Gid: member}, "reload", "reload needs root"},
		{"root", &syscall.Credential{}, "reload", "ok"},
		{"root", &syscall.Credential{}, "direct", "ok"},
	}
	for _, tt := range tests {
		t.Run(tt.who+" "+tt.command, func(t *testing.T) {
			if got, _, _ := strings.Cut(as(t, tt.cred, c, tt.command), ","); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

// The group cannot keep root out by taking all places.
func TestGroupLeavesRoomForRoot(t *testing.T) {
	labtest.Need(t, labtest.Root)
	_, c := serve(t, control.Options{Group: "daemon", MaxClients: 4})
	if err := os.Chmod(filepath.Dir(c.Socket), 0o755); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		dial(t, c)
	}
	member := &syscall.Credential{Uid: 65534, Gid: 1}
	if got := as(t, member, c, "status"); !strings.Contains(got, "try again") {
		t.Errorf("a member had root's place: %q", got)
	}
	if got := as(t, &syscall.Credential{}, c, "status"); got != "ok" {
		t.Errorf("root has no place: %q", got)
	}
}

// Join moves the process that asks, and tells it in which namespace and cgroup
// the kernel saw it.
func TestCallerIsMoved(t *testing.T) {
	labtest.Need(t, labtest.Root, labtest.CgroupV2)
	cg := labtest.New(t).Cgroup("sel")
	f := &fake{move: cg.Dir}
	_, c := serve(t, control.Options{Source: f})
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"="+c.Socket+" join")
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "0::"+cg.Path+"\n") {
		t.Fatalf("the caller is not in %s: %v\n%s", cg.Path, err, out)
	}
	if f.peer.PID != cmd.Process.Pid {
		t.Errorf("process %d was moved, %d had asked", f.peer.PID, cmd.Process.Pid)
	}
	if err := f.peer.Alive(); err == nil {
		t.Error("a process that has ended counts as alive")
	}
	if err := f.peer.MoveTo(cg.Dir); err == nil {
		t.Error("a process that has ended could be moved")
	}
}

func TestPeerIsSeen(t *testing.T) {
	var ino uint64
	var cgroup string
	var errs [2]error
	_, c := serve(t, control.Options{Source: joiner{&fake{}, func(p *control.Peer) {
		ino, errs[0] = p.Netns()
		cgroup, errs[1] = p.Cgroup()
	}}})
	if err := c.Join(t.Context(), "", false); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/ns/net", &st); err != nil {
		t.Fatal(err)
	}
	if errs[0] != nil || ino != st.Ino {
		t.Errorf("network namespace %d, want %d (%v)", ino, st.Ino, errs[0])
	}
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	if errs[1] != nil || !strings.Contains(string(own), "0::"+cgroup+"\n") {
		t.Errorf("cgroup %q, %v; own: %s", cgroup, errs[1], own)
	}
}

// joiner looks at the peer of a Join.
type joiner struct {
	*fake
	look func(*control.Peer)
}

func (j joiner) Join(p *control.Peer, _ string, _ bool) error {
	j.look(p)
	return nil
}
