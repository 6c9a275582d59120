package dialer

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"cgtun/flow"
)

const (
	// maxHead bounds what an HTTP proxy may say before the tunnel, in bytes.
	maxHead = 16 << 10
	// maxInterim bounds the answers 1xx among it.
	maxInterim = 8
)

// answer is what an HTTP proxy said to a CONNECT.
type answer struct {
	status int
	reason flow.Reason // that a field tells; Unknown: none does
}

var (
	errNoHTTP    = errors.New("the answer is not HTTP/1")
	errLongHead  = fmt.Errorf("the head of the answer is longer than %d bytes", maxHead)
	errNoEnding  = fmt.Errorf("more than %d interim answers", maxInterim)
	errSwitching = errors.New("the answer switches to another protocol")
)

// readHead reads the heads of answers up to the first final one, and not a byte
// more: it reads byte by byte, so that what follows stays where the relay looks
// for it, in the socket. Heads are short.
func readHead(r io.Reader) (answer, error) {
	var line []byte
	var b [1]byte
	var a answer
	begun, interim := false, 0
	for range maxHead {
		if _, err := io.ReadFull(r, b[:]); err != nil {
			return answer{}, err
		}
		if b[0] != '\n' { // alone it ends a line too: RFC 9112 §2.2
			line = append(line, b[0])
			continue
		}
		text := string(bytes.TrimSuffix(line, []byte("\r")))
		line = line[:0]
		switch {
		case !begun:
			status, ok := statusOf(text)
			if !ok {
				return answer{}, errNoHTTP
			}
			a, begun = answer{status: status}, true
		case text != "":
			a.field(text)
		case a.status == 101:
			return answer{}, errSwitching
		case a.status/100 != 1:
			return a, nil
		default:
			if interim++; interim > maxInterim {
				return answer{}, errNoEnding
			}
			begun = false
		}
	}
	return answer{}, errLongHead
}

// statusOf reads a status line (RFC 9112 §4).
func statusOf(line string) (status int, ok bool) {
	version, rest, _ := strings.Cut(line, " ")
	code, _, _ := strings.Cut(rest, " ")
	if version != "HTTP/1.1" && version != "HTTP/1.0" || len(code) != 3 {
		return 0, false
	}
	for i := range len(code) {
		if code[i] < '0' || code[i] > '9' {
			return 0, false
		}
		status = 10*status + int(code[i]-'0')
	}
	return status, status >= 100 && status <= 599
}

// field notes what a field says of why there is no way to the target.
func (a *answer) field(line string) {
	name, value, ok := strings.Cut(line, ":")
	if !ok {
		return
	}
	switch strings.ToLower(name) {
	case "proxy-status":
		a.because(proxyStatus(value))
	case "x-squid-error":
		a.because(squidError(value))
	}
}

func (a *answer) because(why flow.Reason) {
	if a.reason == flow.Unknown {
		a.reason = why
	}
}

// proxyErrors are the words of RFC 9209 §2.3 that say more than a status.
var proxyErrors = map[string]flow.Reason{
	"connection_refused":        flow.Refused,
	"dns_timeout":               flow.HostUnreachable,
	"dns_error":                 flow.HostUnreachable,
	"destination_not_found":     flow.HostUnreachable,
	"destination_unavailable":   flow.HostUnreachable,
	"destination_ip_unroutable": flow.NetUnreachable,
	"destination_ip_prohibited": flow.Prohibited,
	"http_request_denied":       flow.Prohibited,
	"connection_timeout":        flow.TimedOut,
}

// proxyStatus reads the parameter error of a Proxy-Status field (RFC 9209), of
// the member that stands last: the hop nearest to us. It reads just enough of
// RFC 8941 for that: a quoted text with ", ;error=" in it reads as what it is not,
// and costs a right word.
func proxyStatus(value string) flow.Reason {
	if i := strings.LastIndexByte(value, ','); i >= 0 {
		value = value[i+1:]
	}
	for param := range strings.SplitSeq(value, ";") {
		if word, ok := strings.CutPrefix(strings.TrimSpace(param), "error="); ok {
			return proxyErrors[word]
		}
	}
	return flow.Unknown
}

// squidError reads "ERR_CONNECT_FAIL 111", of squid: what failed, and the errno
// of Linux, which names the reason where the status is 503 for all of them.
func squidError(value string) flow.Reason {
	what, number, _ := strings.Cut(strings.TrimSpace(value), " ")
	errno, err := strconv.ParseUint(number, 10, 8)
	if what != "ERR_CONNECT_FAIL" || err != nil || errno == 0 {
		return flow.Unknown
	}
	return flow.ReasonOf(unix.Errno(errno))
}

// err is the error of an answer that is no tunnel: *denied or *refusal.
func (a answer) err(known bool) error {
	if a.status == 407 {
		if known {
			return &denied{"407: it does not take the username and password", true}
		}
		return &denied{"407: it asks for a username and password, and the outbound has none", true}
	}
	why := a.reason
	switch {
	case why == flow.Refused, why == flow.HostUnreachable, why == flow.NetUnreachable, why == flow.Prohibited, why == flow.TimedOut:
	case a.status == 401, a.status == 403:
		why = flow.Prohibited
	case a.status == 408, a.status == 504:
		why = flow.TimedOut
	default:
		why = flow.HostUnreachable
	}
	return &refusal{reason: why, text: fmt.Sprintf("the answer is %d", a.status)}
}
