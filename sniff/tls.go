package sniff

import "encoding/binary"

// The parts of TLS that lie in the open (RFC 8446 §4.1.2, §5.1).
const (
	recordHandshake = 22
	recordHeader    = 5
	maxRecord       = 1<<14 + 256
	clientHello     = 1
	serverName      = 0 // extension, and type of a name in it
)

// tls reads the ClientHello at the beginning of a stream, in however many
// records.
func tls(b []byte) (string, error) {
	var message []byte
	for {
		whole := len(b) >= recordHeader
		if whole {
			n := int(binary.BigEndian.Uint16(b[3:]))
			if b[0] != recordHandshake || b[1] != 3 || n == 0 || n > maxRecord {
				return "", ErrNone
			}
			end := min(recordHeader+n, len(b))
			whole = end == recordHeader+n
			message = append(message, b[recordHeader:end]...)
			b = b[end:]
		}
		name, err := hello(message)
		if err != ErrShort || !whole {
			return name, err
		}
	}
}

// hello reads a ClientHello, as far as it is there.
func hello(b []byte) (string, error) {
	m := cursor{b: b}
	if kind := m.number(1); m.short {
		return "", ErrShort
	} else if kind != clientHello {
		return "", ErrNone
	}
	length := m.number(3)
	if m.short {
		return "", ErrShort
	}
	if length > maxMessage {
		return "", ErrNone
	}
	// What is behind the message is not read as part of it.
	m.b = m.b[:min(len(m.b), length)]
	whole := len(m.b) == length
	name, err := m.extensions()
	if err == ErrShort && whole {
		err = ErrNone
	}
	return name, err
}

func (c *cursor) extensions() (string, error) {
	const versionAndRandom = 2 + 32
	c.bytes(versionAndRandom)
	c.bytes(c.number(1)) // session id
	c.bytes(c.number(2)) // cipher suites
	c.bytes(c.number(1)) // compression methods
	list := cursor{b: c.upTo(c.number(2))}
	for !c.short {
		kind := list.number(2)
		data := list.bytes(list.number(2))
		if list.short {
			return "", ErrShort
		}
		if kind == serverName {
			return nameIn(data)
		}
	}
	return "", ErrShort
}

// nameIn reads the extension.
func nameIn(data []byte) (string, error) {
	all := cursor{b: data}
	list := cursor{b: all.bytes(all.number(2))}
	for !all.short && len(list.b) > 0 {
		kind := list.number(1)
		text := list.bytes(list.number(2))
		if list.short {
			break
		}
		if kind == serverName {
			return plain(text)
		}
	}
	return "", ErrNone
}

// cursor reads numbers and bytes, until there are too few: short then, and
// nothing but zeros come.
type cursor struct {
	b     []byte
	short bool
}

func (c *cursor) bytes(n int) []byte {
	if c.short || len(c.b) < n {
		c.short = true
		return nil
	}
	b := c.b[:n]
	c.b = c.b[n:]
	return b
}

// upTo is bytes, but fewer where there are no more.
func (c *cursor) upTo(n int) []byte { return c.bytes(min(n, len(c.b))) }

// number reads a number of n bytes.
func (c *cursor) number(n int) (v int) {
	for _, b := range c.bytes(n) {
		v = v<<8 | int(b)
	}
	return v
}

// varint reads a number of QUIC's (RFC 9000 §16).
func (c *cursor) varint() int {
	if c.short || len(c.b) == 0 {
		c.short = true
		return 0
	}
	n := 1 << (c.b[0] >> 6)
	const lengthBits = 0x3f
	v := 0
	for i, b := range c.bytes(n) {
		if i == 0 {
			b &= lengthBits
		}
		v = v<<8 | int(b)
	}
	return v
}
