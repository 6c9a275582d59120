package docker_test

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"

	"cgtun/internal/labtest"
)

// fakeEnv makes the test binary something that says it is a docker daemon: it
// answers at the socket FAKE_SOCKET, if there is one, as FAKE_ANSWER, and of its
// networks as FAKE_NETWORKS, if there are any; mute, it answers nothing. A child of
// it is in the cgroup with the file FAKE_CHILD.
const fakeEnv = "CGTUN_DOCKER_FAKE"

const mute = "mute"

func TestMain(m *testing.M) {
	if os.Getenv(fakeEnv) == "" {
		labtest.Main(m)
		return
	}
	if err := fake(); err != nil {
		fmt.Fprintln(os.Stderr, "fake:", err)
		os.Exit(1)
	}
}

func fake() error {
	if procs := os.Getenv("FAKE_CHILD"); procs != "" {
		child := exec.Command("sh", "-c", `echo $$ >"$0" && echo moved && exec sleep 1000`, procs)
		child.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		runtime.LockOSThread() // whose end would be the child's
		out, err := child.StdoutPipe()
		if err == nil {
			err = child.Start()
		}
		if err == nil {
			_, err = out.Read(make([]byte, 1))
		}
		if err != nil {
			return err
		}
	}
	name := os.Getenv("FAKE_SOCKET")
	if name == "" {
		fmt.Println("ready")
		select {}
	}
	l, err := net.Listen("unix", name)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	return http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer := os.Getenv("FAKE_ANSWER")
		if answer == mute {
			<-r.Context().Done()
			return
		}
		if networks := os.Getenv("FAKE_NETWORKS"); r.URL.Path == "/networks" && networks != "" {
			answer = networks
		}
		if r.URL.Path == "/version" || r.URL.Path == "/networks" {
			_, _ = w.Write([]byte(answer))
		}
	}))
}
