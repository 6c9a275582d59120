package docker

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxAnswer and maxHeader bound what a daemon says.
	maxAnswer, maxHeader = 4 << 20, 64 << 10
	// maxSockets bounds the sockets of a daemon that are tried.
	maxSockets = 8
	// maxName bounds its version as it is shown.
	maxName = 64
)

// answer is what GET /version says.
type answer struct {
	Version    string
	APIVersion string `json:"ApiVersion"`
}

// api is the number as numbers.
func (a *answer) api() (v [2]int, ok bool) {
	_, err := fmt.Sscanf(a.APIVersion, "%d.%d", &v[0], &v[1])
	return v, err == nil && v[0] > 0
}

// errNoSocket says that a daemon listens on no socket that has a name.
var errNoSocket = errors.New("it listens on no unix socket")

// ask asks a daemon for its version.
func ask(ctx context.Context, pid int) (a answer, err error) {
	err = get(ctx, pid, "/version", &a)
	if _, ok := a.api(); err == nil && !ok {
		err = errors.New("ask dockerd for its version: no version is answered")
	}
	a.Version = a.Version[:min(len(a.Version), maxName)]
	return a, err
}

// get asks a daemon on each of its sockets until one answers.
func get(ctx context.Context, pid int, what string, into any) error {
	names := socketsOf(pid)
	if len(names) == 0 {
		return errNoSocket
	}
	var errs []error
	for _, name := range names {
		err := getAt(ctx, pid, name, "http://docker"+what, into)
		if err == nil {
			return nil
		}
		errs = append(errs, fmt.Errorf("ask dockerd at %s for %s: %w", name, what, err))
	}
	return errors.Join(errs...)
}

func getAt(ctx context.Context, pid int, name, url string, into any) error {
	at, err := openIn(pid, name, unix.O_PATH)
	if err != nil {
		return err
	}
	defer at.Close()
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d", at.Fd()))
		},
		DisableKeepAlives:      true,
		MaxResponseHeaderBytes: maxHeader,
	}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return err
	}
	res, err := transport.RoundTrip(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return errors.New(http.StatusText(res.StatusCode))
	}
	return json.NewDecoder(http.MaxBytesReader(nil, res.Body, maxAnswer)).Decode(into)
}

// socketsOf lists the named unix sockets that a process listens on: those that
// are called as usual first.
func socketsOf(pid int) []string {
	has := make(map[string]bool)
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	for _, e := range entries {
		to, err := os.Readlink(path.Join(dir, e.Name()))
		if inode, ok := strings.CutPrefix(to, "socket:["); ok && err == nil {
			has[strings.TrimSuffix(inode, "]")] = true
		}
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/unix", pid))
	if err != nil {
		return nil
	}
	names := listening(text, has)
	slices.SortStableFunc(names, func(a, b string) int { return rank(a) - rank(b) })
	return names[:min(len(names), maxSockets)]
}

func rank(name string) int {
	switch {
	case path.Base(name) == "docker.sock":
		return 0
	case strings.Contains(name, "libnetwork") || strings.Contains(name, "containerd") || strings.Contains(name, "plugins"):
		return 2
	}
	return 1
}

// acceptsConnections is __SO_ACCEPTCON in the flags of /proc/net/unix.
const acceptsConnections = "00010000"

// listening reads /proc/net/unix:
//
//	Num       RefCount Protocol Flags    Type St Inode Path
//	0000…: 00000002 00000000 00010000 0001 01 24703 /run/docker.sock
func listening(text []byte, has map[string]bool) (names []string) {
	sc := bufio.NewScanner(bytes.NewReader(text))
	for sc.Scan() {
		f := strings.SplitN(sc.Text(), " ", 8)
		f = slices.DeleteFunc(f, func(s string) bool { return s == "" })
		if len(f) < 7 || f[3] != acceptsConnections {
			continue
		}
		rest := strings.Fields(strings.Join(f[6:], " "))
		if len(rest) == 2 && has[rest[0]] && strings.HasPrefix(rest[1], "/") {
			names = append(names, rest[1])
		}
	}
	return names
}

// asking is how a daemon that begins is asked: it listens before it answers.
const (
	askEvery = 50 * time.Millisecond
	// silence is when it is held not to answer any more.
	silence = time.Minute
	// noSocket is when it is held not to listen on any.
	noSocket = 10 * time.Second
)

// askUntil asks until there is an answer.
func askUntil(ctx context.Context, pid int) (answer, error) {
	ctx, cancel := context.WithTimeout(ctx, silence)
	defer cancel()
	begin := time.Now()
	for pause := askEvery; ; pause = min(2*pause, 20*askEvery) {
		a, err := ask(ctx, pid)
		if err == nil || errors.Is(err, errNoSocket) && time.Since(begin) > noSocket {
			return a, err
		}
		select {
		case <-ctx.Done():
			return a, err
		case <-time.After(pause):
		}
	}
}
