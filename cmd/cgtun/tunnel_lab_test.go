package main_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/flow"
	"cgtun/internal/labtest"
	"cgtun/relay"
)

// faithful is a proxy on the router that passes each end on as what it is, which
// those that people use do not all do. By TLS if config is not nil.
func (w *world) faithful(addr string, config *tls.Config, ask asked) *labtest.Server {
	w.t.Helper()
	return w.router.Serve(addr, func(c *net.TCPConn) error {
		var client flow.Conn = flow.NewTCPConn(c)
		if config != nil {
			client = &secured{tls.Server(unended{c}, config), client}
		}
		target, yes, no, err := ask(client)
		if err != nil {
			return fmt.Errorf("read request: %w", err)
		}
		to, err := w.router.Dial("tcp", target)
		if err != nil {
			_, err := io.WriteString(client, no)
			return err
		}
		defer to.Close()
		if _, err := io.WriteString(client, yes); err != nil {
			return err
		}
		relay.Streams(context.Background(), client, flow.NewTCPConn(to.(*net.TCPConn)), &relay.Options{})
		return nil
	})
}

// asked reads what a client of a proxy wants, and returns the two answers.
type asked func(client net.Conn) (target, yes, no string, err error)

func askedByCONNECT(client net.Conn) (target, yes, no string, err error) {
	q, err := http.ReadRequest(bufio.NewReaderSize(client, 16))
	if err != nil {
		return "", "", "", err
	}
	return q.Host, "HTTP/1.1 200 OK\r\n\r\n", "HTTP/1.1 502 Bad Gateway\r\nProxy-Status: lab; error=connection_refused\r\n\r\n", nil
}

func askedBySOCKS5(client net.Conn) (target, yes, no string, err error) {
	b := make([]byte, 22)
	if _, err := io.ReadFull(client, b[:3]); err != nil {
		return "", "", "", err
	}
	if _, err := client.Write([]byte{5, 0}); err != nil {
		return "", "", "", err
	}
	if _, err := io.ReadFull(client, b[:4]); err != nil {
		return "", "", "", err
	}
	size := map[byte]int{1: 4, 4: 16}[b[3]]
	if _, err := io.ReadFull(client, b[4:4+size+2]); err != nil {
		return "", "", "", err
	}
	addr, _ := netip.AddrFromSlice(b[4 : 4+size])
	to := netip.AddrPortFrom(addr, binary.BigEndian.Uint16(b[4+size:]))
	return to.String(), "\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00", "\x05\x05\x00\x01\x00\x00\x00\x00\x00\x00", nil
}

// unended is what is below TLS, whose ends are TLS's own: any other is a break.
type unended struct{ net.Conn }

func (u unended) Read(b []byte) (int, error) {
	n, err := u.Conn.Read(b)
	if err == io.EOF {
		err = unix.ECONNRESET
	}
	return n, err
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
// through proxies of each kind, and a chain of two: every byte, ends as ends, also
// where one side ends long before the other, resets as resets.
func TestEndingsThroughProxies(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "dig", "dnsmasq")
	file := w.certificate(middle4)
	certificate, err := tls.LoadX509KeyPair(file, file)
	if err != nil {
		t.Fatal(err)
	}
	w.faithful(middle4+":3128", nil, askedByCONNECT)
	w.faithful(middle4+":3129", &tls.Config{Certificates: []tls.Certificate{certificate}}, askedByCONNECT)
	w.faithful(middle4+":1080", nil, askedBySOCKS5)
	kinds := []string{"http", "https", "socks5", "chain"}
	text := w.config(fmt.Sprintf(`
[[outbound]]
name = "http"
type = "http"
server = "10.2.0.1:3128"
[[outbound]]
name = "https"
type = "https"
server = "10.2.0.1:3129"
tls_ca = %q
[[outbound]]
name = "socks5"
type = "socks5"
server = "10.2.0.1:1080"
[[outbound]]
name = "chain"
type = "socks5"
server = "10.2.0.1:1080"
via = "https"
`, file))
	var servers []*labtest.Server
	for i, kind := range kinds {
		text += fmt.Sprintf("[[rule]]\nport = \"%d-%d\"\nuse = %q\n", 7000+10*i, 7009+10*i, kind)
		servers = append(servers, w.serveOrders(fmt.Sprint(":", 7000+10*i)), w.server.ServeExchange(fmt.Sprint(":", 7001+10*i)))
	}
	more, asked := w.namedProxy()
	d := w.start(text + more)
	n, size, late, seed := 100, 16<<20, time.Second, rand.Int64()
	switch {
	case labtest.Soak():
		n, size, late = 2000, 1<<30, 10*time.Second
	case raceEnabled:
		n, size = 30, 2<<20
	}
	for i, kind := range kinds {
		for _, far := range []string{far4, far6} {
			late = -late // another side with each
			for _, q := range []probe{
				{Do: "mix", To: port(far, 7000+10*i), N: n, Seed: seed},
				{Do: "exchange", To: port(far, 7001+10*i), N: size, Late: late},
			} {
				began := time.Now()
				if out, err := w.try(inside, "env", probeArgs(q)...); err != nil {
					t.Errorf("%s by %s to %s, seed %d: %v %s", q.Do, kind, far, seed, err, out)
				}
				if labtest.Soak() {
					t.Logf("%s of %d by %s to %s: %v", q.Do, q.N, kind, far, time.Since(began).Round(time.Millisecond))
				}
			}
		}
	}
	for i, server := range servers {
		if err := server.Err(); err != nil {
			t.Errorf("seed %d: server by %s: %v", seed, kinds[i/2], err)
		}
	}
	w.asksForNames(asked)
	w.noLeak("through proxies")
	labtest.Eventually(t, 10*time.Second, func() bool { return w.status().Counters.FlowsLive == 0 }, "all flows have ended")
	labtest.Eventually(t, 10*time.Second, func() bool { return openSockets(t, d.Pid) < 20 }, "cgtun's sockets are closed")
	for i, kind := range kinds {
		if a := w.probe(inside, probe{Do: "dial", Network: "tcp", To: port(far4, 7005+10*i)}); a.Errno != "ECONNREFUSED" {
			t.Errorf("nobody listens, by %s: %+v", kind, a)
		}
	}
}

// namedProxy is a proxy that is to be asked for names, with the rules that lead to
// it, and to the servers of names. asked gets what it is asked for.
func (w *world) namedProxy() (config string, asked chan string) {
	w.t.Helper()
	asked = make(chan string, 10)
	w.router.Serve(middle4+":3130", func(c *net.TCPConn) error {
		q, err := http.ReadRequest(bufio.NewReaderSize(c, 16))
		if err != nil {
			return err
		}
		asked <- q.Host
		_, err = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n")
		return err
	})
	config = "[[outbound]]\nname = \"second\"\ntype = \"direct\"\ninterface = \"eth1\"\n[[rule]]\nport = 53\nuse = \"second\"\n"
	config += fmt.Sprintf("[[outbound]]\nname = \"named\"\ntype = \"http\"\nserver = \"%s:3130\"\nremote_dns = true\n[[rule]]\nport = 7090\nuse = \"named\"\n", middle4)
	w.zone(w.server, far4, far4)
	w.zone(w.server, far6, far4)
	w.listening(53)
	return config, asked
}

// asksForNames looks up a name and connects to what it stands for, and to an
// address of which no name is known.
func (w *world) asksForNames(asked <-chan string) {
	w.t.Helper()
	w.run(inside, "dig", "+short", "+tries=1", "+time=6", "name.example", "@"+far4)
	for far, want := range map[string]string{far4: "name.example:7090", far6: port(far6, 7090)} {
		w.probe(inside, probe{Do: "dial", Network: "tcp", To: port(far, 7090)})
		select {
		case got := <-asked:
			if got != want {
				w.t.Errorf("the proxy was asked for %q, want %q", got, want)
			}
		case <-time.After(5 * time.Second):
			w.t.Errorf("the proxy was not asked for %q", want)
		}
	}
}

// refusal is what a client hears of something that does not work.
type refusal struct {
	what    string
	network string
	port    int
	errno   string
}

// hearsNo tries each of them, at both families, and a ping, which no proxy
// carries. A wrong password is known at the second try, and not sent again.
func (w *world) hearsNo(list []refusal) {
	w.t.Helper()
	for _, tt := range list {
		for _, far := range []string{far4, far6} {
			want := tt.errno
			if strings.HasPrefix(tt.what, "a wrong") && far == far6 {
				want = "EACCES"
			}
			if a := w.probe(inside, probe{Do: "dial", Network: tt.network, To: port(far, tt.port), Say: "x", Wait: 20 * time.Second}); a.Errno != want || a.Took > 10*time.Second {
				w.t.Errorf("%s at %s: %+v, want %s", tt.what, far, a, want)
			}
		}
	}
	if out, err := w.try(inside, "ping", "-c1", "-W3", far4); err == nil || !strings.Contains(out, "Packet filtered") {
		w.t.Errorf("ping through a proxy: %v, %s", err, out)
	}
}
