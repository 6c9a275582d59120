package replay

import (
	"bytes"
	"encoding/binary"
)

// Verdict is what may be done with the first bytes of a client.
type Verdict uint8

// The verdicts.
const (
	Undecided Verdict = iota // not complete, and nothing against it yet
	Safe                     // complete, and the same to a server once or twice
	Unsafe                   // or not known to be safe: never to be sent twice
)

// String returns the verdict in words.
func (v Verdict) String() string { return [...]string{"undecided", "safe", "unsafe"}[v] }

// portDNS is where a query is taken for one.
const portDNS = 53

// Judge says whether all that a client has sent to a port may be sent to two
// servers. Safe are: a TLS ClientHello without early data (RFC 8446 §4.2.10),
// alone; complete heads of GET, HEAD and OPTIONS requests without a body (RFC 9110
// §9.2.2), any number of them; DNS queries (RFC 7766); the banner of SSH (RFC
// 4253 §4.2). What is not well formed is Unsafe: another reader could see
// something else in it.
func Judge(b []byte, port uint16) Verdict {
	switch {
	case len(b) == 0:
		return Undecided
	case port == portDNS:
		return judgeDNS(b)
	case b[0] == recordHandshake:
		return judgeTLS(b)
	case startsAs(b, "SSH-"):
		return judgeSSH(b)
	}
	return judgeHTTP(b)
}

// startsAs says whether b begins with text, or is the beginning of it.
func startsAs(b []byte, text string) bool {
	n := min(len(b), len(text))
	return string(b[:n]) == text[:n]
}

// What TLS has (RFC 8446 §4, §5.1).
const (
	recordHandshake   = 22
	recordHeader      = 5
	maxRecord         = 1 << 14
	clientHello       = 1
	handshakeHeader   = 4
	extensionEarly    = 42
	helloBeforeFields = 2 + 32 // legacy_version, random
)

// judgeTLS puts the handshake together from its records.
func judgeTLS(b []byte) Verdict {
	var message []byte
	for len(b) > 0 {
		if b[0] != recordHandshake {
			return Unsafe
		}
		if len(b) < recordHeader {
			return Undecided
		}
		n := int(binary.BigEndian.Uint16(b[3:]))
		if b[1] != 3 || n == 0 || n > maxRecord {
			return Unsafe
		}
		b = b[recordHeader:]
		part := b[:min(n, len(b))]
		if message == nil {
			message = part[:len(part):len(part)] // is looked at where it lies
		} else {
			message = append(message, part...)
		}
		if v := judgeHello(message); v == Unsafe {
			return Unsafe
		}
		if len(part) < n {
			return Undecided
		}
		b = b[n:]
	}
	return judgeHello(message)
}

// judgeHello looks at a handshake message: a whole ClientHello and nothing else.
func judgeHello(m []byte) Verdict {
	if len(m) == 0 {
		return Undecided
	}
	if m[0] != clientHello {
		return Unsafe
	}
	if len(m) < handshakeHeader {
		return Undecided
	}
	n := int(m[1])<<16 | int(m[2])<<8 | int(m[3])
	body := m[handshakeHeader:]
	if n > maxKept || len(body) > n {
		return Unsafe
	}
	if len(body) < n {
		return Undecided
	}
	return judgeExtensions(body)
}

// judgeExtensions looks for early data in the body of a ClientHello.
func judgeExtensions(body []byte) Verdict {
	r := reader{b: body}
	r.skip(helloBeforeFields)
	r.skip(r.uint8())  // session id
	r.skip(r.uint16()) // cipher suites
	r.skip(r.uint8())  // compression methods
	if r.bad {
		return Unsafe
	}
	if len(r.b) == 0 {
		return Safe // TLS 1.2 without extensions
	}
	if r.uint16() != len(r.b) {
		return Unsafe
	}
	for len(r.b) > 0 && !r.bad {
		kind := r.uint16()
		r.skip(r.uint16())
		if kind == extensionEarly {
			return Unsafe
		}
	}
	if r.bad {
		return Unsafe
	}
	return Safe
}

// reader takes fields off a message; bad: there was less than that.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) skip(n int) {
	if n > len(r.b) {
		r.b, r.bad = nil, true
		return
	}
	r.b = r.b[n:]
}

func (r *reader) uint8() int {
	if len(r.b) < 1 {
		r.bad = true
		return 0
	}
	n := int(r.b[0])
	r.b = r.b[1:]
	return n
}

func (r *reader) uint16() int {
	if len(r.b) < 2 {
		r.b, r.bad = nil, true
		return 0
	}
	n := int(binary.BigEndian.Uint16(r.b))
	r.b = r.b[2:]
	return n
}

var lineEnd = []byte("\r\n")

var safeMethods = []string{"GET ", "HEAD ", "OPTIONS "}

// judgeHTTP takes one head after the other (RFC 9112 §2).
func judgeHTTP(b []byte) Verdict {
	for len(b) > 0 {
		known := false
		for _, m := range safeMethods {
			known = known || startsAs(b, m)
		}
		if !known {
			return Unsafe
		}
		head, rest, whole := bytes.Cut(b, []byte("\r\n\r\n"))
		if !whole {
			// What is there already can speak against it.
			if i := bytes.LastIndex(head, []byte("\r\n")); i >= 0 && !safeHead(head[:i]) {
				return Unsafe
			}
			return Undecided
		}
		if !safeHead(head) {
			return Unsafe
		}
		b = rest
	}
	return Safe
}

// safeHead looks at a request line and fields. Whatever two servers could read in
// two ways is not safe.
func safeHead(head []byte) bool {
	line, fields, more := bytes.Cut(head, lineEnd)
	if !bytes.HasSuffix(line, []byte(" HTTP/1.1")) && !bytes.HasSuffix(line, []byte(" HTTP/1.0")) || !clean(line) || bytes.Count(line, []byte(" ")) != 2 {
		return false
	}
	if !more {
		return true
	}
	for field := range bytes.SplitSeq(fields, lineEnd) {
		name, value, ok := bytes.Cut(field, []byte(":"))
		if !ok || len(name) == 0 || bytes.ContainsAny(name, " \t") || !clean(field) {
			return false
		}
		switch {
		case bytes.EqualFold(name, []byte("content-length")):
			if string(bytes.Trim(value, " \t")) != "0" {
				return false
			}
		case bytes.EqualFold(name, []byte("transfer-encoding")), bytes.EqualFold(name, []byte("expect")), bytes.EqualFold(name, []byte("upgrade")):
			return false
		}
	}
	return true
}

// clean says that text has no line ends or zeros in it.
func clean(b []byte) bool { return !bytes.ContainsAny(b, "\r\n\x00") }

const maxBanner = 255 // RFC 4253 §4.2, the line's end included

func judgeSSH(b []byte) Verdict {
	switch i := bytes.IndexByte(b, '\n'); {
	case i == len(b)-1 && len(b) <= maxBanner && bytes.IndexByte(b, 0) < 0 && startsAs(b, "SSH-") && len(b) > len("SSH-"):
		return Safe
	case i < 0 && len(b) <= maxBanner:
		return Undecided
	}
	return Unsafe
}

const headerDNS = 12

// judgeDNS takes queries with their lengths (RFC 1035 §4.2.2).
func judgeDNS(b []byte) Verdict {
	for len(b) > 0 {
		if len(b) < 2 {
			return Undecided
		}
		n := int(binary.BigEndian.Uint16(b))
		m := b[2:]
		if n < headerDNS {
			return Unsafe
		}
		if len(m) < headerDNS {
			return Undecided
		}
		// A query, opcode 0, of one question, with no answers or updates in it.
		if m[2]&0xf8 != 0 || binary.BigEndian.Uint16(m[4:]) != 1 || binary.BigEndian.Uint32(m[6:]) != 0 {
			return Unsafe
		}
		if len(m) < n {
			return Undecided
		}
		b = m[n:]
	}
	return Safe
}
