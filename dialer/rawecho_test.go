package dialer

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"
)

func TestEchoIDsAreBoundedAndGivenBack(t *testing.T) {
	p := idPool{taken: make(map[uint16]bool)}
	var last uint16
	for range maxRawEchoes {
		id, err := p.take()
		if err != nil {
			t.Fatal(err)
		}
		last = id
	}
	if len(p.taken) != maxRawEchoes {
		t.Errorf("%d different ones of %d", len(p.taken), maxRawEchoes)
	}
	if _, err := p.take(); !errors.Is(err, unix.EMFILE) {
		t.Errorf("one more: %v", err)
	}
	p.give(last)
	if _, err := p.take(); err != nil {
		t.Errorf("after one was given back: %v", err)
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
