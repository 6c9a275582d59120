// Package sniff finds the name of the server in the first bytes that a client
// sends: of TLS (SNI, RFC 6066 §3), of HTTP/1 (Host, RFC 9112 §3.2), and of QUIC
// versions 1 and 2 (RFC 9001 §5.2, RFC 9369). It owns nothing and waits for
// nothing: whoever reads the bytes calls it again with more of them.
//
// A client can write there what it likes. A name sorts, it grants nothing.
package sniff

import (
	"bytes"
	"errors"
	"net/netip"
	"strings"
)

// The places where a name is found, as flows show them.
const (
	FromSNI  = "sni"
	FromHost = "host"
	FromQUIC = "quic"
)

// Bounds: what has no name within them has none.
const (
	// MaxStream is how many bytes of a stream may be needed: a ClientHello in
	// small records, with the keys of the time after quanta.
	MaxStream  = 16 << 10
	maxHTTP    = 8 << 10
	maxName    = 253
	maxMessage = 64 << 10 // of a handshake
)

// ErrShort says that there is no telling before more bytes have come.
var ErrShort = errors.New("more bytes are needed")

// ErrNone says that there is no name, whatever comes.
var ErrNone = errors.New("there is no name")

// Stream looks at the first bytes of a TCP stream. The name is in lower case,
// without a dot at the end.
func Stream(b []byte) (name, from string, err error) {
	switch {
	case len(b) == 0:
		return "", "", ErrShort
	case b[0] == recordHandshake:
		name, err = tls(b)
		from = FromSNI
	default:
		name, err = http(b)
		from = FromHost
	}
	if errors.Is(err, ErrShort) && len(b) >= MaxStream {
		err = ErrNone
	}
	if err != nil {
		return "", "", err
	}
	return name, from, nil
}

// plain returns a name as flows have it. Addresses are none.
func plain(text []byte) (string, error) {
	name := strings.ToLower(strings.TrimSuffix(string(text), "."))
	if name == "" || len(name) > maxName {
		return "", ErrNone
	}
	if _, err := netip.ParseAddr(strings.Trim(name, "[]")); err == nil {
		return "", ErrNone
	}
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > 63 {
			return "", ErrNone
		}
		for i := range len(label) {
			if c := label[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '_' {
				return "", ErrNone
			}
		}
	}
	return name, nil
}

// http reads the head of a request as far as the Host field.
func http(b []byte) (string, error) {
	if len(b) > maxHTTP {
		return "", ErrNone
	}
	line, rest, whole := bytes.Cut(b, []byte("\r\n"))
	method, target, spaced := bytes.Cut(line, []byte(" "))
	const longestMethod = 20
	if len(method) == 0 || len(method) > longestMethod {
		return "", ErrNone
	}
	for _, c := range method {
		if c < 'A' || c > 'Z' {
			return "", ErrNone
		}
	}
	if !whole {
		return "", ErrShort
	}
	if !spaced || !bytes.Contains(target, []byte(" HTTP/1.")) {
		return "", ErrNone
	}
	for {
		if line, rest, whole = bytes.Cut(rest, []byte("\r\n")); !whole {
			return "", ErrShort
		}
		if len(line) == 0 {
			return "", ErrNone
		}
		key, value, _ := bytes.Cut(line, []byte(":"))
		if !bytes.EqualFold(key, []byte("host")) {
			continue
		}
		value = bytes.TrimSpace(value)
		if port := bytes.LastIndexByte(value, ':'); port >= 0 && !bytes.HasSuffix(value, []byte("]")) {
			value = value[:port]
		}
		return plain(value)
	}
}
