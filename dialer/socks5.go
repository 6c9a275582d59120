package dialer

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"

	"cgtun/flow"
)

// The numbers of RFC 1928 and RFC 1929.
const (
	socksVersion = 5

	socksNoAuth   = 0x00
	socksPassword = 0x02
	socksNoMethod = 0xff

	passwordVersion = 1

	socksConnect   = 1
	socksAssociate = 3

	socksV4   = 1
	socksName = 3
	socksV6   = 4

	socksSucceeded = 0

	maxSocksText = 255 // bytes of a name, username or password: one has its length
	socksHead    = 4   // version, command or reply, reserved, type of the address
	maxSocksSize = socksHead + 1 + maxSocksText + 2
)

// socks5 is the protocol of RFC 1928 with the passwords of RFC 1929. Every answer
// is read to its last byte and no further: what follows is the tunnel's, and the
// socket stays one that the kernel can move bytes of.
type socks5 struct {
	username string
	password Secret
}

func newSOCKS5(c Config) (*socks5, error) {
	s := &socks5{username: c.Username, password: c.Password}
	for _, text := range []struct{ key, value string }{{"username", s.username}, {"password", s.password.Reveal()}} {
		if len(text.value) > maxSocksText {
			return nil, fmt.Errorf("%s is longer than the %d bytes that SOCKS5 has for it", text.key, maxSocksText)
		}
	}
	return s, nil
}

// greet implements protocol.
func (s *socks5) greet(_ context.Context, c flow.Conn) (flow.Conn, error) {
	hello := []byte{socksVersion, 1, socksNoAuth}
	if s.username != "" {
		hello = []byte{socksVersion, 2, socksNoAuth, socksPassword}
	}
	if _, err := c.Write(hello); err != nil {
		return nil, err
	}
	var answer [2]byte
	if _, err := io.ReadFull(c, answer[:]); err != nil {
		return nil, err
	}
	method := answer[1]
	switch {
	case answer[0] != socksVersion:
		return nil, notSOCKS(answer[0])
	case method == socksNoAuth:
		return c, nil
	case method == socksPassword && s.username != "":
		return c, s.authenticate(c)
	case method == socksNoMethod && s.username == "":
		return nil, &denied{text: "the proxy wants a username and password"}
	case method == socksNoMethod:
		return nil, &denied{text: "the proxy takes no username and password"}
	}
	return nil, fmt.Errorf("the proxy chose method %d, which it was not offered", method)
}

func notSOCKS(version byte) error {
	return fmt.Errorf("the answer is not SOCKS5: it begins with byte %#02x", version)
}

// authenticate sends the password (RFC 1929).
func (s *socks5) authenticate(c flow.Conn) error {
	b := []byte{passwordVersion, byte(len(s.username))}
	b = append(b, s.username...)
	password := s.password.Reveal()
	b = append(b, byte(len(password)))
	b = append(b, password...)
	if _, err := c.Write(b); err != nil {
		return err
	}
	// The version of this answer is wrong in servers of old, and nobody looks.
	var answer [2]byte
	if _, err := io.ReadFull(c, answer[:]); err != nil {
		return err
	}
	if answer[1] != 0 {
		return &denied{text: "the proxy refused the username and password"}
	}
	return nil
}

// connect implements protocol.
func (s *socks5) connect(_ context.Context, c flow.Conn, t Target) (flow.Conn, error) {
	if _, err := socksAsk(c, socksConnect, t); err != nil {
		return nil, err
	}
	return c, nil
}

// socksAsk sends a request and returns the address of the answer, which is of use
// to some commands only.
func socksAsk(c io.ReadWriter, command byte, t Target) (socksAddr, error) {
	b := make([]byte, 0, maxSocksSize)
	b = append(b, socksVersion, command, 0)
	b = appendSocksAddr(b, socksAddr{name: t.Name, addr: t.Addr})
	if _, err := c.Write(b); err != nil {
		return socksAddr{}, err
	}
	return readSocksReply(c)
}

// socksAddr is an address on the wire: a name with addr's port, or addr.
type socksAddr struct {
	name string
	addr netip.AddrPort
}

// appendSocksAddr appends type, address and port.
func appendSocksAddr(b []byte, a socksAddr) []byte {
	ip := a.addr.Addr().Unmap()
	switch {
	case a.name != "":
		b = append(b, socksName, byte(len(a.name)))
		b = append(b, a.name...)
	case ip.Is4():
		a4 := ip.As4()
		b = append(append(b, socksV4), a4[:]...)
	default:
		a16 := ip.As16()
		b = append(append(b, socksV6), a16[:]...)
	}
	return binary.BigEndian.AppendUint16(b, a.addr.Port())
}

// readSocksReply reads the answer to a request. That it says no is a *refusal,
// whatever comes after.
func readSocksReply(r io.Reader) (socksAddr, error) {
	var b [maxSocksSize]byte
	if _, err := io.ReadFull(r, b[:socksHead]); err != nil {
		return socksAddr{}, err
	}
	switch {
	case b[0] != socksVersion:
		return socksAddr{}, notSOCKS(b[0])
	case b[1] != socksSucceeded:
		return socksAddr{}, socksRefusal(b[1])
	}
	size := 0
	rest := b[socksHead:]
	switch b[3] {
	case socksV4:
		size = 4 + 2
	case socksV6:
		size = 16 + 2
	case socksName:
		if _, err := io.ReadFull(r, rest[:1]); err != nil {
			return socksAddr{}, unexpected(err)
		}
		size = int(rest[0]) + 2
		rest = rest[1:]
	default:
		return socksAddr{}, fmt.Errorf("the proxy answered with an address of type %d, which is none", b[3])
	}
	if _, err := io.ReadFull(r, rest[:size]); err != nil {
		return socksAddr{}, unexpected(err)
	}
	a, _, ok := cutSocksAddr(b[3 : len(b)-len(rest)+size])
	if !ok {
		return socksAddr{}, errors.New("the proxy answered with a name of no length")
	}
	return a, nil
}

// unexpected is the end of an answer that had begun.
func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// cutSocksAddr reads type, address and port at the front of b, and returns what
// is behind them. A name that is an address is one.
func cutSocksAddr(b []byte) (a socksAddr, rest []byte, ok bool) {
	if len(b) < 2 {
		return a, nil, false
	}
	size, kind := 0, b[0]
	b = b[1:]
	switch kind {
	case socksV4:
		size = 4
	case socksV6:
		size = 16
	case socksName:
		size = int(b[0])
		b = b[1:]
	}
	if size == 0 || len(b) < size+2 {
		return a, nil, false
	}
	var ip netip.Addr
	if kind == socksName {
		a.name = string(b[:size])
		if parsed, err := netip.ParseAddr(a.name); err == nil {
			a.name, ip = "", parsed.Unmap().WithZone("")
		}
	} else {
		ip, _ = netip.AddrFromSlice(b[:size])
		ip = ip.Unmap()
	}
	a.addr = netip.AddrPortFrom(ip, binary.BigEndian.Uint16(b[size:]))
	return a, b[size+2:], true
}

// socksReplies says what the reply codes mean, from 1 on (RFC 1928 §6). Proxies
// tell by "TTL expired" that the target did not answer in time.
var socksReplies = []refusal{
	{flow.Unknown, "general failure", nil},
	{flow.Prohibited, "not allowed by its rules", nil},
	{flow.NetUnreachable, "network unreachable", nil},
	{flow.HostUnreachable, "host unreachable", nil},
	{flow.Refused, "connection refused", nil},
	{flow.TimedOut, "TTL expired", nil},
	{flow.Unknown, "it does not know the command", errors.ErrUnsupported},
	{flow.NetUnreachable, "it does not know that type of address", nil},
}

func socksRefusal(code byte) error {
	if int(code) <= len(socksReplies) {
		r := socksReplies[code-1]
		return &refusal{r.reason, "the proxy says: " + r.text, r.err}
	}
	return &refusal{flow.Unknown, fmt.Sprintf("the proxy says: error %d", code), nil}
}
