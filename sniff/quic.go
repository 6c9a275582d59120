package sniff

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/binary"
)

// version is what a version of QUIC protects its first packets with: so that
// nobody on the way takes part by accident, not so that nobody can read them.
type version struct {
	salt        []byte
	kind        byte // the two bits of an Initial
	key, iv, hp string
}

var versions = map[uint32]version{
	1: {
		salt: []byte{0x38, 0x76, 0x2c, 0xf7, 0xf5, 0x59, 0x34, 0xb3, 0x4d, 0x17, 0x9a, 0xe6, 0xa4, 0xc8, 0x0c, 0xad, 0xcc, 0xbb, 0x7f, 0x0a},
		kind: 0, key: "quic key", iv: "quic iv", hp: "quic hp",
	},
	0x6b3343cf: { // RFC 9369
		salt: []byte{0x0d, 0xed, 0xe3, 0xde, 0xf7, 0x00, 0xa6, 0xdb, 0x81, 0x93, 0x81, 0xbe, 0x6e, 0x26, 0x9d, 0xcb, 0xf9, 0xbd, 0x2e, 0xd9},
		kind: 1, key: "quicv2 key", iv: "quicv2 iv", hp: "quicv2 hp",
	},
}

const (
	maxConnID  = 20
	sampleSize = 16
	// maxPieces bounds the CRYPTO frames of a flow.
	maxPieces = 64
)

// Datagrams looks at the first datagrams of a flow, in whatever order. ErrShort:
// they are QUIC's, and the name is in one that follows: a ClientHello with the
// keys of the time after quanta does not fit into one.
func Datagrams(all ...[]byte) (name string, err error) {
	var c crypto
	for _, b := range all {
		for len(b) > 0 {
			payload, rest, err := initial(b)
			if err != nil {
				break
			}
			c.frames(payload)
			b = rest
		}
	}
	if !c.any {
		return "", ErrNone
	}
	return hello(c.message())
}

// initial takes the first packet off a datagram and opens it. ErrNone: it is no
// Initial that a client could have sent.
func initial(b []byte) (payload, rest []byte, err error) {
	const longHeader, fixedBit, kindShift = 0x80, 0x40, 4
	m := cursor{b: b}
	first := m.number(1)
	v, known := versions[uint32(m.number(4))]
	if m.short || !known || first&longHeader == 0 || first&fixedBit == 0 || byte(first>>kindShift)&3 != v.kind {
		return nil, nil, ErrNone
	}
	id := m.bytes(m.number(1))
	source := m.bytes(m.number(1))
	m.bytes(m.varint()) // token
	length := m.varint()
	header := len(b) - len(m.b)
	if packet := m.bytes(length); m.short || len(id) > maxConnID || len(source) > maxConnID || len(packet) < 4+sampleSize {
		return nil, nil, ErrNone
	}
	payload, err = v.open(b[:header+length], header, id)
	return payload, m.b, err
}

// open takes the protection off a packet (RFC 9001 §5). The packet is not
// changed.
func (v *version) open(packet []byte, header int, id []byte) ([]byte, error) {
	initial, err := hkdf.Extract(sha256.New, id, v.salt)
	if err != nil {
		return nil, ErrNone
	}
	const keySize, ivSize, secretSize = 16, 12, 32
	secret := expand(initial, "client in", secretSize)
	key, iv, hp := expand(secret, v.key, keySize), expand(secret, v.iv, ivSize), expand(secret, v.hp, keySize)
	block, err := aes.NewCipher(hp)
	if err != nil {
		return nil, ErrNone
	}
	var mask [aes.BlockSize]byte
	block.Encrypt(mask[:], packet[header+4:header+4+sampleSize])

	head := append([]byte(nil), packet[:header+4]...)
	const protectedBits, lengthBits = 0x0f, 0x03
	head[0] ^= mask[0] & protectedBits
	n := int(head[0]&lengthBits) + 1
	for i := range n {
		head[header+i] ^= mask[1+i]
		iv[ivSize-n+i] ^= head[header+i]
	}
	if block, err = aes.NewCipher(key); err != nil {
		return nil, ErrNone
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, ErrNone
	}
	payload, err := aead.Open(nil, iv, packet[header+n:], head[:header+n])
	if err != nil {
		return nil, ErrNone
	}
	return payload, nil
}

// expand is HKDF-Expand-Label (RFC 8446 §7.1) without a context.
func expand(secret []byte, label string, n int) []byte {
	const prefix = "tls13 "
	info := binary.BigEndian.AppendUint16(nil, uint16(n))
	info = append(info, byte(len(prefix)+len(label)))
	info = append(append(info, prefix+label...), 0)
	b, err := hkdf.Expand(sha256.New, secret, string(info), n)
	if err != nil {
		return make([]byte, n) // not for these lengths
	}
	return b
}

// crypto is what came of the handshake, in whatever order.
type crypto struct {
	pieces []piece
	any    bool // it was a client's Initial
}

type piece struct {
	offset int
	data   []byte
}

// The frames that an Initial can have (RFC 9000 §17.2.2).
const (
	framePadding = 0
	framePing    = 1
	frameAck     = 2
	frameAckECN  = 3
	frameCrypto  = 6
)

// frames gathers the pieces of a packet.
func (c *crypto) frames(b []byte) {
	c.any = true
	m := cursor{b: b}
	for len(m.b) > 0 && !m.short {
		switch kind := m.varint(); kind {
		case framePadding, framePing:
		case frameAck, frameAckECN:
			m.varint()
			m.varint()
			ranges := m.varint()
			m.varint()
			for range min(ranges, len(m.b)) {
				m.varint()
				m.varint()
			}
			if kind == frameAckECN {
				m.varint()
				m.varint()
				m.varint()
			}
		case frameCrypto:
			offset := m.varint()
			data := m.bytes(m.varint())
			if !m.short && offset < maxMessage && len(c.pieces) < maxPieces {
				c.pieces = append(c.pieces, piece{offset, data})
			}
		default:
			return
		}
	}
}

// message returns what is there from the beginning on without a gap.
func (c *crypto) message() []byte {
	var whole []byte
	for grown := true; grown; {
		grown = false
		for _, p := range c.pieces {
			if end := p.offset + len(p.data); p.offset <= len(whole) && end > len(whole) {
				whole = append(whole, p.data[len(whole)-p.offset:]...)
				grown = true
			}
		}
	}
	return whole
}
