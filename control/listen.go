package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// TakenError says that a live instance has the socket.
type TakenError struct {
	Socket string
	PID    int // of the holder; 0: not visible from here
}

func (e *TakenError) Error() string {
	holder := "another process"
	if e.PID != 0 {
		holder = fmt.Sprintf("process %d", e.PID)
	}
	return fmt.Sprintf("control socket %s is taken by %s: stop that one, or set another [control] socket", e.Socket, holder)
}

// noGroup stands for the gid where there is no group of the wanted name.
const noGroup = -1

// listen makes the socket, in place of one that a dead instance left, and
// returns the gid of the group that may connect, or noGroup.
func listen(path, group string) (*net.UnixListener, int64, error) {
	if len(path) > maxSocket {
		return nil, 0, fmt.Errorf("control socket %s: the path is longer than %d bytes", path, maxSocket)
	}
	if _, err := RemoveStale(path); err != nil {
		return nil, 0, err
	}
	// The file gets the mode that the socket has at bind: set before, so that
	// there is no moment at which anybody else can connect.
	private := func(_, _ string, c syscall.RawConn) error {
		var inner error
		err := c.Control(func(fd uintptr) { inner = unix.Fchmod(int(fd), 0o600) })
		return errors.Join(err, inner)
	}
	lc := net.ListenConfig{Control: private}
	l, err := lc.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, 0, fmt.Errorf("listen on control socket: %w", err)
	}
	gid, err := openToGroup(path, group)
	if err != nil {
		return nil, 0, errors.Join(err, l.Close())
	}
	return l.(*net.UnixListener), gid, nil
}

// dirMark is the attribute (xattr(7)) of a directory that cgtun made. It is a
// trusted one: on tmpfs others came late, and nobody but root can set it.
const dirMark = "trusted.cgtun"

// makeDir makes the socket's directory, 0755, and returns what it made, the
// innermost first. What was there stays as it is.
func makeDir(dir string) (made []string, err error) {
	for d := dir; ; d = filepath.Dir(d) {
		if _, err := os.Stat(d); !errors.Is(err, fs.ErrNotExist) {
			break
		}
		made = append(made, d)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make directory of the control socket: %w", err)
	}
	for _, d := range made {
		// The umask may have taken bits that the group needs to get here.
		if err := os.Chmod(d, 0o755); err != nil {
			return made, fmt.Errorf("make directory of the control socket: %w", err)
		}
		// Where there are no attributes, an empty directory is left by a kill.
		_ = unix.Setxattr(d, dirMark, nil, 0)
	}
	return made, nil
}

// marked returns the directory of a socket and those above it that cgtun made,
// now or in an earlier life, the innermost first.
func marked(socket string) (dirs []string) {
	path, err := filepath.Abs(socket)
	if err != nil {
		return nil
	}
	for d := filepath.Dir(path); ; d = filepath.Dir(d) {
		if _, err := unix.Getxattr(d, dirMark, nil); err != nil {
			return dirs
		}
		dirs = append(dirs, d)
	}
}

// RemoveDirs removes the directories of a socket that cgtun made and that are
// empty.
func RemoveDirs(socket string) { removeDirs(marked(socket)) }

// openToGroup gives the socket to the group and returns its gid, or noGroup if
// there is none of that name: then the socket is root's alone.
func openToGroup(path, group string) (int64, error) {
	g, err := user.LookupGroup(group)
	if err != nil {
		return noGroup, nil
	}
	gid, err := strconv.ParseUint(g.Gid, 10, 32)
	if err != nil {
		return noGroup, fmt.Errorf("gid of group %s: %w", group, err)
	}
	if err := os.Chown(path, 0, int(gid)); err != nil {
		return noGroup, fmt.Errorf("give control socket to group %s: %w", group, err)
	}
	if err := os.Chmod(path, 0o660); err != nil {
		return noGroup, fmt.Errorf("give control socket to group %s: %w", group, err)
	}
	return int64(gid), nil
}

// RemoveStale removes the socket file of an instance that is dead. It says
// whether there was one; *TakenError: its holder lives, and nothing is done.
func RemoveStale(path string) (bool, error) {
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look at control socket: %w", err)
	}
	if st.Mode().Type() != fs.ModeSocket {
		return false, fmt.Errorf("control socket %s: a file of that name is there and is no socket", path)
	}
	conn, err := net.Dial("unix", path)
	switch {
	case err == nil:
		defer conn.Close()
		return false, &TakenError{Socket: path, PID: holder(conn.(*net.UnixConn))}
	case errors.Is(err, unix.EAGAIN): // its queue is full: somebody holds it
		return false, &TakenError{Socket: path}
	case !errors.Is(err, unix.ECONNREFUSED):
		return false, fmt.Errorf("look at control socket: %w", err)
	}
	if err := os.Remove(path); err != nil {
		return false, fmt.Errorf("remove stale control socket: %w", err)
	}
	return true, nil
}

// holder is the pid of the process that listens where c is connected.
func holder(c *net.UnixConn) int {
	p, err := peerOf(c)
	if err != nil {
		return 0
	}
	p.close()
	return p.PID
}
