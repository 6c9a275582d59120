package sniff

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	stdtls "crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/net/quic"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// helloOf is what crypto/tls sends first.
func helloOf(t testing.TB, name string) []byte {
	t.Helper()
	here, there := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = stdtls.Client(here, &stdtls.Config{ServerName: name, InsecureSkipVerify: name == ""}).Handshake()
	}()
	head := make([]byte, recordHeader)
	if _, err := io.ReadFull(there, head); err != nil {
		t.Fatal(err)
	}
	body := make([]byte, binary.BigEndian.Uint16(head[3:]))
	if _, err := io.ReadFull(there, body); err != nil {
		t.Fatal(err)
	}
	there.Close()
	here.Close()
	<-done
	return append(head, body...)
}

// inRecords cuts the message of one record into records of n bytes.
func inRecords(record []byte, n int) (all []byte) {
	for message := record[recordHeader:]; len(message) > 0; {
		k := min(n, len(message))
		all = append(all, record[0], record[1], record[2], byte(k>>8), byte(k))
		all = append(all, message[:k]...)
		message = message[k:]
	}
	return all
}

// The name is found as soon as it is there, at every place that the stream can be
// cut at, and in small records.
func TestStream(t *testing.T) {
	hello := helloOf(t, "WWW.Example.ORG")
	tests := []struct {
		name, stream, want, from string
	}{
		{"TLS", string(hello), "www.example.org", "sni"},
		{"TLS in small records", string(inRecords(hello, 7)), "www.example.org", "sni"},
		{"TLS in records of one byte", string(inRecords(hello, 1)), "www.example.org", "sni"},
		{"TLS without a name", string(helloOf(t, "")), "", ""},
		{"TLS, an address", string(helloOf(t, "192.0.2.1")), "", ""},
		{"TLS, escapes", string(helloOf(t, "a\x1b[31m%n\n.example")), "", ""},
		{"TLS, 10 kB", string(helloOf(t, strings.Repeat("a.", 5000)+"example")), "", ""},
		{"an alert", "\x15\x03\x01\x00\x02\x02\x28", "", ""},
		{"a record too long", "\x16\x03\x01\xff\xff\x01", "", ""},
		{"HTTP", "GET / HTTP/1.1\r\nAccept: */*\r\nhOST:  a.Example:8080 \r\n\r\n", "a.example", "host"},
		{"HTTP, a dot", "POST /x HTTP/1.0\r\nHost: a.example.\r\n", "a.example", "host"},
		{"HTTP, an address", "GET / HTTP/1.1\r\nHost: 192.0.2.1:80\r\n\r\n", "", ""},
		{"HTTP, an address of IPv6", "GET / HTTP/1.1\r\nHost: [2001:db8::1]:80\r\n\r\n", "", ""},
		{"HTTP without Host", "GET / HTTP/1.0\r\n\r\n", "", ""},
		{"HTTP, escapes", "GET / HTTP/1.0\r\nHost: a\x1b[31m.example\r\n\r\n", "", ""},
		{"HTTP, too long", "GET / HTTP/1.0\r\nHost: " + strings.Repeat("a.", 5000) + "\r\n\r\n", "", ""},
		{"HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "", ""},
		{"SSH", "SSH-2.0-OpenSSH_9.2\r\n", "", ""},
		{"zeros", "\x00\x00\x00", "", ""},
	}
	for _, tt := range tests {
		told := false
		for n := range len(tt.stream) + 1 {
			name, from, err := Stream([]byte(tt.stream[:n]))
			switch {
			case errors.Is(err, ErrShort):
				if told {
					t.Fatalf("%s: asks for more at %d after it has told", tt.name, n)
				}
			case err == nil && (name != tt.want || from != tt.from), err != nil && tt.want != "":
				t.Fatalf("%s: at %d of %d: %q from %q, %v", tt.name, n, len(tt.stream), name, from, err)
			default:
				told = true
			}
		}
		if !told {
			t.Errorf("%s: never told", tt.name)
		}
	}
	if _, _, err := Stream(bytes.Repeat([]byte{recordHandshake, 3, 1, 0, 1, 1}, MaxStream/6+1)); !errors.Is(err, ErrNone) {
		t.Errorf("endless records: %v", err)
	}
}

// The keys of the samples in RFC 9001 §A.1 and RFC 9369 §A.1.
func TestKeys(t *testing.T) {
	id, _ := hex.DecodeString("8394c8f03e515708")
	for number, want := range map[uint32]string{
		1:          "1f369613dd76d5467730efcbe3b1a22d fa044b2f42a3fd3b46fb255c 9f50449e04a0e810283a1e9933adedd2",
		0x6b3343cf: "8b1a0bc121284290a29e0971b5cd045d 91f73e2351d8fa91660e909f 45b95e15235d6f45a6b19cbcb0294ba9",
	} {
		v := versions[number]
		first, err := hkdf.Extract(sha256.New, id, v.salt)
		if err != nil {
			t.Fatal(err)
		}
		secret := expand(first, "client in", 32)
		got := hex.EncodeToString(expand(secret, v.key, 16)) + " " + hex.EncodeToString(expand(secret, v.iv, 12)) + " " + hex.EncodeToString(expand(secret, v.hp, 16))
		if got != want {
			t.Errorf("version %#x: %s, want %s", number, got, want)
		}
	}
}

// The first datagrams of a real client have the name: one, and with the keys of
// the time after quanta two.
func TestRealQUIC(t *testing.T) {
	for curve, want := range map[stdtls.CurveID]int{stdtls.X25519: 1, stdtls.X25519MLKEM768: 2} {
		got := firstOf(t, curve, want)
		if _, err := Datagrams(got[want-1]); want > 1 && !errors.Is(err, ErrShort) {
			t.Errorf("%v: of the last one: %v", curve, err)
		}
		slices.Reverse(got)
		if name, err := Datagrams(got...); name != "quic.example" || err != nil {
			t.Errorf("%v: %q, %v", curve, name, err)
		}
	}
}

// firstOf returns the first n datagrams of a client.
func firstOf(t *testing.T, curve stdtls.CurveID, n int) (all [][]byte) {
	t.Helper()
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	e, err := quic.Listen("udp", "127.0.0.1:0", nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	dialled := make(chan struct{})
	go func() {
		defer close(dialled)
		_, _ = e.Dial(ctx, "udp", pc.LocalAddr().String(), &quic.Config{TLSConfig: &stdtls.Config{
			ServerName: "quic.Example", MinVersion: stdtls.VersionTLS13, CurvePreferences: []stdtls.CurveID{curve}, NextProtos: []string{"h3"}}})
	}()
	_ = pc.SetReadDeadline(time.Now().Add(10 * time.Second))
	for range n {
		b := make([]byte, 2000)
		n, _, err := pc.ReadFrom(b)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, b[:n])
	}
	cancel()
	<-dialled
	gone, stop := context.WithTimeout(context.Background(), time.Second)
	defer stop()
	_ = e.Close(gone)
	return all
}

// seal makes an Initial of frames, as a client does.
func seal(number uint32, id, frames []byte) []byte {
	v := versions[number]
	const pn = 4
	b := binary.BigEndian.AppendUint32([]byte{0xc0 | v.kind<<4 | pn - 1}, number)
	b = append(append(b, byte(len(id))), id...)
	b = append(b, 0, 0) // no source id, no token
	b = binary.BigEndian.AppendUint16(b, uint16(pn+len(frames)+16)|0x4000)
	header := len(b)
	b = binary.BigEndian.AppendUint32(b, 7)
	first, _ := hkdf.Extract(sha256.New, id, v.salt)
	secret := expand(first, "client in", 32)
	iv := expand(secret, v.iv, 12)
	iv[11] ^= 7
	block, _ := aes.NewCipher(expand(secret, v.key, 16))
	aead, _ := cipher.NewGCM(block)
	b = aead.Seal(b, iv, frames, b)
	hp, _ := aes.NewCipher(expand(secret, v.hp, 16))
	var mask [16]byte
	hp.Encrypt(mask[:], b[header+4:header+20])
	b[0] ^= mask[0] & 0x0f
	for i := range pn {
		b[header+i] ^= mask[1+i]
	}
	return b
}

func cryptoFrame(offset int, data []byte) []byte {
	b := binary.BigEndian.AppendUint16([]byte{frameCrypto}, uint16(offset)|0x4000)
	b = binary.BigEndian.AppendUint16(b, uint16(len(data))|0x4000)
	return append(b, data...)
}

// Pieces in another order, in several packets of one datagram, with padding and
// pings between, of both versions.
func TestQUICInPieces(t *testing.T) {
	hello := helloOf(t, "quic.example")[recordHeader:]
	third := len(hello) / 3
	id := []byte("connid00")
	ack := []byte{frameAck, 1, 0, 1, 0, 1, 1}
	for number := range versions {
		tests := []struct {
			name string
			b    []byte
			want string
			err  error
		}{
			{"one", seal(number, id, cryptoFrame(0, hello)), "quic.example", nil},
			{"the last first", seal(number, id, bytes.Join([][]byte{cryptoFrame(2*third, hello[2*third:]), {0, 0, 1}, cryptoFrame(third, hello[third:2*third]), ack, cryptoFrame(0, hello[:third+5]), make([]byte, 50)}, nil)), "quic.example", nil},
			{"two packets", append(seal(number, id, cryptoFrame(third, hello[third:])), seal(number, id, cryptoFrame(0, hello[:third]))...), "quic.example", nil},
			{"the rest is to come", seal(number, id, cryptoFrame(0, hello[:40])), "", ErrShort},
			{"the beginning is to come", seal(number, id, cryptoFrame(40, hello[40:])), "", ErrShort},
			{"another key", seal(number, []byte("x"), cryptoFrame(0, hello))[:100], "", ErrNone},
			{"an unknown frame", seal(number, id, append([]byte{0x1d}, cryptoFrame(0, hello)...)), "", ErrShort},
		}
		for _, tt := range tests {
			if name, err := Datagrams(tt.b); name != tt.want || !errors.Is(err, tt.err) {
				t.Errorf("%#x: %s: %q, %v", number, tt.name, name, err)
			}
		}
		one, two := seal(number, id, cryptoFrame(60, hello[60:])), seal(number, id, cryptoFrame(0, hello[:60]))
		for _, all := range [][][]byte{{one, two}, {two, one}, {one, one, []byte("x"), two}} {
			if _, err := Datagrams(all[0]); !errors.Is(err, ErrShort) {
				t.Errorf("%#x: of one of two datagrams: %v", number, err)
			}
			if name, err := Datagrams(all...); name != "quic.example" || err != nil {
				t.Errorf("%#x: of two datagrams: %q, %v", number, name, err)
			}
		}
		spoiled := seal(number, id, cryptoFrame(0, hello))
		spoiled[len(spoiled)-1]++
		if _, err := Datagrams(spoiled); !errors.Is(err, ErrNone) {
			t.Errorf("%#x: spoiled: %v", number, err)
		}
	}
	for _, b := range []string{"", "x", strings.Repeat("\xff", 1200), "\xc0\x00\x00\x00\x01", "\xc0\x00\x00\x00\x00\x08aaaaaaaa"} {
		if _, err := Datagrams([]byte(b)); !errors.Is(err, ErrNone) {
			t.Errorf("%.10q: %v", b, err)
		}
	}
}

func fine(t *testing.T, name string) {
	if name == "" || len(name) > maxName || strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r >= 0x7f || r >= 'A' && r <= 'Z' }) {
		t.Fatalf("name %q", name)
	}
}

func FuzzStream(f *testing.F) {
	hello := helloOf(f, "www.example.org")
	f.Add(hello)
	f.Add(inRecords(hello, 100))
	f.Add([]byte("GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		kept := bytes.Clone(b)
		name, from, err := Stream(b)
		if err == nil {
			fine(t, name)
			// More bytes change nothing.
			if again, also, err := Stream(append(bytes.Clone(b), "\x00more"...)); len(b) < MaxStream/2 && (again != name || also != from || err != nil) {
				t.Fatalf("%q, and with more %q, %v", name, again, err)
			}
		}
		if !bytes.Equal(b, kept) {
			t.Fatal("the bytes were changed")
		}
	})
}

func FuzzDatagram(f *testing.F) {
	hello := helloOf(f, "quic.example")[recordHeader:]
	f.Add(seal(1, []byte("connid00"), cryptoFrame(0, hello)), []byte{})
	f.Add([]byte{}, cryptoFrame(3, hello))
	f.Fuzz(func(t *testing.T, b, frames []byte) {
		if len(frames) > 1200 {
			return
		}
		kept := bytes.Clone(b)
		for _, datagram := range [][]byte{b, seal(1, []byte("connid00"), slices.Concat(frames, make([]byte, 20)))} {
			if name, err := Datagrams(datagram); err == nil {
				fine(t, name)
			}
		}
		if !bytes.Equal(b, kept) {
			t.Fatal("the bytes were changed")
		}
	})
}
