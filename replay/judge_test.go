package replay_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"net"
	"strings"
	"testing"
	"time"

	"cgtun/replay"
)

// hello returns the first flight of Go's TLS client.
func hello(t testing.TB, c *tls.Config) []byte {
	t.Helper()
	ours, theirs := net.Pipe()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = tls.Client(ours, c).HandshakeContext(ctx)
	}()
	buf := make([]byte, 16<<10)
	n, err := theirs.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	theirs.Close()
	<-done
	return buf[:n]
}

// withExtension puts one more extension into a ClientHello of one record.
func withExtension(b []byte, kind uint16) []byte {
	b = append(bytes.Clone(b), byte(kind>>8), byte(kind), 0, 0)
	add := func(at, n int) { // to a length
		binary.BigEndian.PutUint16(b[at:], binary.BigEndian.Uint16(b[at:])+uint16(n))
	}
	add(3, 4)
	add(7, 4) // the low half of the handshake's length
	at := 9 + 34
	at += 1 + int(b[at])
	at += 2 + int(binary.BigEndian.Uint16(b[at:]))
	at += 1 + int(b[at])
	add(at, 4)
	return b
}

// inRecords cuts a handshake into records of n bytes.
func inRecords(b []byte, n int) (cut []byte) {
	for message := b[5:]; len(message) > 0; {
		part := message[:min(n, len(message))]
		message = message[len(part):]
		cut = append(append(cut, 22, 3, 1, byte(len(part)>>8), byte(len(part))), part...)
	}
	return cut
}

func query(id byte) string {
	m := []byte{0, id, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 'a', 0, 0, 1, 0, 1}
	return string(append([]byte{0, byte(len(m))}, m...))
}

func TestJudge(t *testing.T) {
	tls12 := string(hello(t, &tls.Config{ServerName: "a.example", MaxVersion: tls.VersionTLS12}))
	tls13 := string(hello(t, &tls.Config{ServerName: "a.example", NextProtos: []string{"h2"}}))
	const get, post = "GET / HTTP/1.1\r\nHost: a\r\n\r\n", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"
	for _, tt := range []struct {
		name string
		b    string
		port uint16
		want replay.Verdict
	}{
		{"nothing", "", 443, replay.Undecided},
		{"TLS 1.2", tls12, 443, replay.Safe},
		{"TLS 1.3", tls13, 443, replay.Safe},
		{"TLS 1.3 to another port", tls13, 8000, replay.Safe},
		{"in small records", string(inRecords([]byte(tls13), 100)), 443, replay.Safe},
		{"with early data", string(withExtension([]byte(tls13), 42)), 443, replay.Unsafe},
		{"early data in small records", string(inRecords(withExtension([]byte(tls13), 42), 64)), 443, replay.Unsafe},
		{"with another extension", string(withExtension([]byte(tls13), 0xfafa)), 443, replay.Safe},
		{"all but a byte", tls13[:len(tls13)-1], 443, replay.Undecided},
		{"a second record", tls13 + "\x14\x03\x03\x00\x01\x01", 443, replay.Unsafe},
		{"twice", tls13 + tls13, 443, replay.Unsafe},
		{"another handshake message", "\x16\x03\x01\x00\x04\x02\x00\x00\x00", 443, replay.Unsafe},
		{"an empty record", "\x16\x03\x01\x00\x00" + tls13, 443, replay.Unsafe},
		{"application data", "\x17\x03\x03\x00\x01a", 443, replay.Unsafe},
		{"GET", get, 80, replay.Safe},
		{"HEAD and OPTIONS", "HEAD / HTTP/1.0\r\n\r\nOPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", 80, replay.Safe},
		{"pipelined", get + get + get, 80, replay.Safe},
		{"GET without an end", get[:len(get)-1], 80, replay.Undecided},
		{"a second GET without an end", get + "GET /", 80, replay.Undecided},
		{"the beginning of a method", "OPT", 80, replay.Undecided},
		{"POST", post, 80, replay.Unsafe},
		{"the beginning of POST", "P", 80, replay.Unsafe},
		{"GET, POST", get + post, 80, replay.Unsafe},
		{"GET, the beginning of POST", get + "PO", 80, replay.Unsafe},
		{"GET with a body", "GET / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", 80, replay.Unsafe},
		{"GET with the head of a body", "GET / HTTP/1.1\r\ncontent-length: 3\r\n\r\n", 80, replay.Unsafe},
		{"a blank before the colon", "GET / HTTP/1.1\r\nA : 3\r\n\r\n", 80, replay.Unsafe},
		{"GET that waits for a word", "GET / HTTP/1.1\r\nExpect: 100-continue\r\n\r\n", 80, replay.Unsafe},
		{"GET with a length of 0", "GET / HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 80, replay.Safe},
		{"GET in chunks", "GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 80, replay.Unsafe},
		{"GET in chunks, not complete", "GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nA", 80, replay.Unsafe},
		{"GET that upgrades", "GET / HTTP/1.1\r\nUpgrade: websocket\r\n\r\n", 80, replay.Unsafe},
		{"bare line ends", "GET / HTTP/1.1\nContent-Length: 3\n\r\n\r\n", 80, replay.Unsafe},
		{"a folded field", "GET / HTTP/1.1\r\nA: b\r\n Content-Length: 3\r\n\r\n", 80, replay.Unsafe},
		{"no version", "GET /\r\n\r\n", 80, replay.Unsafe},
		{"HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 80, replay.Unsafe},
		{"GET of HTTP/2", "GET / HTTP/2.0\r\n\r\n", 80, replay.Unsafe},
		{"small letters", "get / HTTP/1.1\r\n\r\n", 80, replay.Unsafe},
		{"SSH", "SSH-2.0-OpenSSH_9.2\r\n", 22, replay.Safe},
		{"SSH without an end", "SSH-2.0-Open", 22, replay.Undecided},
		{"SSH and more", "SSH-2.0-OpenSSH_9.2\r\n\x00\x00", 22, replay.Unsafe},
		{"SSH, too long", "SSH-2.0-" + strings.Repeat("a", 300), 22, replay.Unsafe},
		{"DNS", query(1) + query(2), 53, replay.Safe},
		{"DNS elsewhere", query(1), 5353, replay.Unsafe},
		{"DNS without an end", query(1)[:10], 53, replay.Undecided},
		{"DNS update", strings.Replace(query(1), "\x00\x01\x01\x00", "\x00\x01\x28\x00", 1), 53, replay.Unsafe},
		{"DNS answer", strings.Replace(query(1), "\x00\x01\x01\x00", "\x00\x01\x81\x00", 1), 53, replay.Unsafe},
		{"something else", "\x00\x01\x02", 1234, replay.Unsafe},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := replay.Judge([]byte(tt.b), tt.port); got != tt.want {
				t.Errorf("%v, want %v: %q", got, tt.want, tt.b)
			}
		})
	}
}

// FuzzJudge: bytes that are unsafe do not become safe by more of them, and what is
// safe in parts is safe whole.
func FuzzJudge(f *testing.F) {
	f.Add([]byte("GET / HTTP/1.1\r\nHost: a\r\n\r\n"), 10, uint16(80))
	f.Add(hello(f, &tls.Config{ServerName: "a.example"}), 100, uint16(443))
	f.Add([]byte(query(1)), 5, uint16(53))
	f.Add([]byte("SSH-2.0-x\r\n"), 5, uint16(22))
	f.Fuzz(func(t *testing.T, b []byte, cut int, port uint16) {
		whole := replay.Judge(b, port)
		if cut < 0 || cut > len(b) {
			return
		}
		part := replay.Judge(b[:cut], port)
		if part == replay.Unsafe && whole != replay.Unsafe {
			t.Errorf("%q is unsafe, and %v with %q", b[:cut], whole, b[cut:])
		}
		if whole == replay.Safe && bytes.Contains(b, []byte("POST ")) && bytes.HasPrefix(b, []byte("POST ")) {
			t.Errorf("safe: %q", b)
		}
	})
}
