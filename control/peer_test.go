package control_test

import (
	"context"
	"errors"
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
			if got := as(t, tt.cred, c, tt.command); got != tt.want {
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

// The daemon is told who asks by descriptors and numbers of the kernel's, and
// they go on naming that process after it has ended.
func TestCallerIsNamed(t *testing.T) {
	labtest.Need(t, labtest.Root)
	var seen struct {
		pid  string
		ino  uint64
		errs error
	}
	_, c := serve(t, control.Options{Source: joiner{&fake{}, func(p *control.Peer) {
		seen.ino, seen.errs = p.Netns()
		fd, err := p.Pidfd()
		if err != nil {
			seen.errs = errors.Join(seen.errs, err)
			return
		}
		defer fd.Close()
		info, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd.Fd()))
		_, rest, _ := strings.Cut(string(info), "\nPid:")
		seen.pid, _, _ = strings.Cut(strings.TrimSpace(rest), "\n")
		seen.errs = errors.Join(seen.errs, err)
	}}})
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"="+c.Socket+" join")
	if out, err := cmd.CombinedOutput(); err != nil || string(out) != "ok" {
		t.Fatalf("%v: %s", err, out)
	}
	if seen.errs != nil {
		t.Fatal(seen.errs)
	}
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/ns/net", &st); err != nil {
		t.Fatal(err)
	}
	if seen.pid != fmt.Sprint(cmd.Process.Pid) || seen.ino != st.Ino {
		t.Errorf("the caller is said to be process %s in namespace %d, and is %d in %d", seen.pid, seen.ino, cmd.Process.Pid, st.Ino)
	}
}

// A caller that ended before the daemon came to it is nobody.
func TestCallerThatEndedIsNotFound(t *testing.T) {
	labtest.Need(t, labtest.Root)
	here, gone := make(chan struct{}), make(chan struct{})
	result := make(chan error, 1)
	_, c := serve(t, control.Options{Source: joiner{&fake{}, func(p *control.Peer) {
		close(here)
		<-gone
		_, err := p.Pidfd()
		result <- err
	}}})
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"="+c.Socket+" join")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	<-here
	cmd.Process.Kill()
	cmd.Wait()
	close(gone)
	if err := <-result; err == nil || !strings.Contains(err.Error(), "has gone") {
		t.Errorf("got %v", err)
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
