package main_test

import (
	"bufio"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"cgtun/control"
	"cgtun/internal/labtest"
)

// connectServer says yes to a CONNECT with the right account, and then echoes;
// "denied" is nobody's.
func connectServer(accounts map[string]string) func(*net.TCPConn) error {
	return func(c *net.TCPConn) error {
		r := bufio.NewReader(c)
		q, err := http.ReadRequest(r)
		if err != nil {
			return err
		}
		q.Header.Set("Authorization", q.Header.Get("Proxy-Authorization"))
		user, password, _ := q.BasicAuth()
		if password == "" || accounts[user] != password || user == "denied" {
			_, err := io.WriteString(c, "HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
			return err
		}
		if _, err := io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n"); err != nil {
			return err
		}
		_, err = io.Copy(c, r)
		return err
	}
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// A password is used, and found nowhere: not in what cgtun says, in no state,
// nowhere in /proc, in no core dump. To be rid of its environment cgtun executes
// itself again, which nobody notices: pid, arguments, what systemd is told.
func TestPasswordsAreFoundNowhere(t *testing.T) {
	t.Parallel()
	labtest.Need(t, labtest.Tool("prlimit"))
	w := newWorld(t)
	m := newManager(t)
	accounts := map[string]string{}
	var words []string // to look for
	for _, user := range []string{"written", "file", "variable", "denied"} {
		accounts[user] = "Hunter2-" + user + "-0123456789"
		words = append(words, accounts[user], base64.StdEncoding.EncodeToString([]byte(user + ":" + accounts[user]))[:24])
	}
	w.server.Serve(":3128", connectServer(accounts))
	secrets := filepath.Join(w.dir, "secrets")
	if err := os.Mkdir(secrets, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(secrets, "file"), []byte(accounts["file"]+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	text := w.config(second)
	for i, user := range []string{"written", "file", "variable", "denied"} {
		key, value := "password", accounts[user]
		switch user {
		case "file":
			key, value = "password_file", filepath.Join(secrets, "file")
		case "variable":
			key, value = "password_env", "CGTUN_TEST_PASSWORD"
		}
		text = fmt.Sprintf("%s\n[[outbound]]\nname = %q\ntype = \"http\"\nserver = \"%s:3128\"\nvia = \"second\"\nusername = %q\n%s = %q\n", text, user, far4, user, key, value)
		// Before the rule that second ends with.
		text = strings.Replace(text, "[[rule]]", fmt.Sprintf("[[rule]]\nport = %d\nuse = %q\n\n[[rule]]", 7000+i, user), 1)
	}
	cmd := w.daemonCommand(text)
	if err := os.Rename(cmd.Args[len(cmd.Args)-1], filepath.Join(secrets, "config.toml")); err != nil {
		t.Fatal(err)
	}
	cmd.Args[len(cmd.Args)-1] = filepath.Join(secrets, "config.toml")
	program := slices.Index(cmd.Args, w.program())
	own := slices.Clone(cmd.Args[program:])
	cmd.Args = slices.Insert(cmd.Args, program, "prlimit", "--core=unlimited")
	cmd.Dir = filepath.Join(w.dir, "core")
	if err := os.Mkdir(cmd.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	cmd.Env = append(os.Environ(), "CGTUN_TEST_PASSWORD="+accounts["variable"], "CGTUN_TEST_KEPT=kept", "NOTIFY_SOCKET="+m.path, "GOTRACEBACK=crash")
	// Not by startCommand, which would take the dump at the end for a panic.
	d := w.lab.StartCommand(cmd)
	d.WaitOutput("msg=ready", 20*time.Second)
	if got := m.until("READY=1"); len(got) != 1 {
		t.Errorf("before READY=1 came %q", got)
	}
	for i, want := range []string{"", "", "", "EHOSTUNREACH"} {
		a := w.probe(inside, probe{Do: "dial", Network: "tcp", To: port(far4, 7000+i), Say: "x"})
		if a.Errno != want || want == "" && a.Heard != "x" {
			t.Errorf("port %d: %+v, want %q", 7000+i, a, want)
		}
	}
	d.WaitOutput("does not take its account", patience())
	said := map[string]string{"log": d.Output()}
	for _, command := range []string{"status", "flows", "doctor", "explain " + port(far4, 7003), fmt.Sprint("status ", d.Pid)} {
		for _, form := range []string{"", " --json"} {
			out, errs, _ := w.cgtun(strings.Fields(command + form)...)
			said[command+form] = out + errs
		}
	}
	for _, file := range []string{"environ", "cmdline"} {
		said[file] = readFile(t, fmt.Sprintf("/proc/%d/%s", d.Pid, file))
	}
	if !strings.Contains(said["environ"], "CGTUN_TEST_KEPT=kept") || !strings.Contains(said["environ"], "NOTIFY_SOCKET=") {
		t.Errorf("more than the password is gone from the environment: %q", said["environ"])
	}
	if got, want := said["cmdline"], strings.Join(own, "\x00")+"\x00"; got != want {
		t.Errorf("arguments %q, want %q", got, want)
	}
	s := ask[control.Status](w, "status")
	if i := slices.IndexFunc(s.Outbounds, func(o control.Outbound) bool { return o.Name == "denied" }); i < 0 || s.Outbounds[i].State != "ejected" || !strings.Contains(string(s.Outbounds[i].Error), "407") || s.PID != d.Pid {
		t.Errorf("status of pid %d: %+v", d.Pid, s)
	}
	if n := strings.Count(said["log"], "does not take its account"); n != 1 {
		t.Errorf("%d lines say that the account is not taken:\n%s", n, said["log"])
	}
	fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", d.Pid))
	for _, fd := range fds {
		if to, err := os.Readlink(fd); err == nil && strings.Contains(to, "memfd") {
			t.Errorf("descriptor %s is still %s", filepath.Base(fd), to)
		}
	}
	// It aborts with a dump of goroutines, and would with one of memory.
	d.Signal(syscall.SIGABRT)
	_ = d.Wait()
	said["log after the abort"] = d.Output()
	if !strings.Contains(d.Output(), "goroutine 1") {
		t.Errorf("no abort:\n%s", d.Output())
	}
	cores, _ := filepath.Glob(filepath.Join(cmd.Dir, "*"))
	for _, core := range cores {
		said[core] = readFile(t, core)
	}
	for where, text := range said {
		for _, word := range words {
			if strings.Contains(text, word) {
				t.Errorf("%q is in %s", word, where)
			}
		}
	}
	if _, errs, code := w.cgtun("cleanup"); code != 0 {
		t.Errorf("cleanup: %s", errs)
	}
}
