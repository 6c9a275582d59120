package dialer

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"
)

// One identifier too many takes the place of the longest idle one.
func TestEchoIDsAreBounded(t *testing.T) {
	p := idPool{taken: make(map[uint16]*echoID)}
	closed := make(map[*echoID]bool)
	var all []*echoID
	for i := range maxRawEchoes {
		id := p.take()
		id.used.Store(int64(i + 10))
		p.opened(id, func() error { closed[id] = true; return nil })
		all = append(all, id)
	}
	all[0].used.Store(1_000) // in use
	if len(p.taken) != maxRawEchoes || len(closed) != 0 {
		t.Errorf("%d different ones of %d, %d closed", len(p.taken), maxRawEchoes, len(closed))
	}
	late := p.take()
	if len(p.taken) != maxRawEchoes || len(closed) != 1 || !closed[all[1]] {
		t.Errorf("%d with one more, %d closed, the longest idle: %v", len(p.taken), len(closed), closed[all[1]])
	}
	// What made room gives nothing back that is another one's by now.
	all[1].value = late.value
	p.give(all[1])
	if p.taken[late.value] != late {
		t.Error("an identifier was given back by who had lost it")
	}
	// Whose socket opens after it made room is closed.
	late.used.Store(1)
	p.take()
	p.opened(late, func() error { closed[late] = true; return nil })
	if !closed[late] {
		t.Error("the socket of who made room is open")
	}
	p.give(all[0])
	if len(p.taken) != maxRawEchoes-1 {
		t.Errorf("%d after one was given back", len(p.taken))
	}
}

func TestEchoIDKeepsTheChecksumRight(t *testing.T) {
	sum := func(b []byte) uint16 {
		var s uint32
		for i := 0; i < len(b); i += 2 {
			s += uint32(binary.BigEndian.Uint16(b[i:]))
		}
		for s > 0xffff {
			s = s&0xffff + s>>16
		}
		return uint16(s)
	}
	for range 1000 {
		msg := make([]byte, 64)
		for i := range msg {
			msg[i] = byte(rand.Uint32())
		}
		binary.BigEndian.PutUint16(msg[2:], 0)
		binary.BigEndian.PutUint16(msg[2:], ^sum(msg))
		id := uint16(rand.Uint32())
		setEchoID(msg, id)
		if got := binary.BigEndian.Uint16(msg[4:]); got != id || sum(msg) != 0xffff {
			t.Fatalf("identifier %d, want %d; the sum is %#x", got, id, sum(msg))
		}
	}
}
