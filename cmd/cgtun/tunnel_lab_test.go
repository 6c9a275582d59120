package main_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"testing"
	"time"

	"cgtun/flow"
	"cgtun/internal/labtest"
	"cgtun/relay"
)

// faithful is a proxy on the router that passes each end on as what it is, which
// those that people use do not all do. By TLS if config is not nil.
func (w *world) faithful(addr string, config *tls.Config) *labtest.Server {
	w.t.Helper()
	return w.router.Serve(addr, func(c *net.TCPConn) error {
		var client flow.Conn = flow.NewTCPConn(c)
		if config != nil {
			client = &secured{tls.Server(c, config), client}
		}
		q, err := http.ReadRequest(bufio.NewReaderSize(client, 16))
		if err != nil {
			return fmt.Errorf("read request: %w", err)
		}
		to, err := w.router.Dial("tcp", q.Host)
		if err != nil {
			_, err := io.WriteString(client, "HTTP/1.1 502 Bad Gateway\r\nProxy-Status: lab; error=connection_refused\r\n\r\n")
			return err
		}
		defer to.Close()
		if _, err := io.WriteString(client, "HTTP/1.1 200 OK\r\n\r\n"); err != nil {
			return err
		}
		relay.Streams(context.Background(), client, flow.NewTCPConn(to.(*net.TCPConn)), relay.Options{})
		return nil
	})
}

// secured is the server's end of TLS, as a Conn.
type secured struct {
	*tls.Conn
	below flow.Conn
}

func (s *secured) Reset() error       { return s.below.Reset() }
func (s *secured) Carrier() flow.Conn { return s.below }

func (s *secured) Close() error {
	_ = s.CloseWrite()
	return s.below.Close()
}

// What TestRandomEndings and TestBulkBothWays see of direct connections holds
// through CONNECT, plain and over TLS: every byte, ends as ends, resets as
// resets.
func TestEndingsThroughProxies(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	file := w.certificate(middle4)
	certificate, err := tls.LoadX509KeyPair(file, file)
	if err != nil {
		t.Fatal(err)
	}
	w.faithful(middle4+":3128", nil)
	w.faithful(middle4+":3129", &tls.Config{Certificates: []tls.Certificate{certificate}})
	text := w.config("")
	var servers []*labtest.Server
	for i, kind := range []string{"http", "https"} {
		text += fmt.Sprintf("[[outbound]]\nname = %q\ntype = %[1]q\nserver = \"%[2]s:%[3]d\"\n", kind, middle4, 3128+i)
		if kind == "https" {
			text += fmt.Sprintf("tls_ca = %q\n", file)
		}
		text += fmt.Sprintf("[[rule]]\nport = \"%d-%d\"\nuse = %q\n", 7000+10*i, 7009+10*i, kind)
		servers = append(servers, w.serveOrders(fmt.Sprint(":", 7000+10*i)), w.server.ServeExchange(fmt.Sprint(":", 7001+10*i)))
	}
	d := w.start(text)
	n, size, seed := 150, 32<<20, rand.Int64()
	if labtest.Soak() {
		n, size = 2000, 1<<30
	}
	if raceEnabled {
		n, size = 30, 2<<20
	}
	for i, kind := range []string{"http", "https"} {
		for j, far := range []string{far4, far6} {
			for _, q := range []probe{
				{Do: "mix", To: port(far, 7000+10*i), N: n, Seed: seed},
				{Do: "exchange", To: port(far, 7001+10*i), N: size >> j},
			} {
				if out, err := w.try(inside, "env", probeArgs(q)...); err != nil {
					t.Errorf("%s to %s, seed %d: %v %s", kind, far, seed, err, out)
				}
			}
		}
	}
	for _, server := range servers {
		if err := server.Err(); err != nil {
			t.Errorf("seed %d: server: %v", seed, err)
		}
	}
	w.noLeak("through proxies")
	labtest.Eventually(t, 10*time.Second, func() bool { return w.status().Counters.FlowsLive == 0 }, "all flows have ended")
	labtest.Eventually(t, 10*time.Second, func() bool { return openSockets(t, d.Pid) < 20 }, "cgtun's sockets are closed")
	if a := w.probe(inside, probe{Do: "dial", Network: "tcp", To: port(far4, 7015)}); a.Errno != "ECONNREFUSED" {
		t.Errorf("nobody listens: %+v", a)
	}
}
