package docker_test

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"testing"

	"cgtun/internal/labtest"
)

// fakeEnv makes the test binary something that says it is a docker daemon: it
// answers at the socket FAKE_SOCKET, if there is one, as FAKE_ANSWER, and of its
// networks as FAKE_NETWORKS, if there are any; mute, it answers nothing.
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
