package relay_test

import (
	"errors"
	"io"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"cgtun/flow"
	"cgtun/relay"
)

func dg(peer int, data string) flow.Datagram {
	return flow.Datagram{Peer: netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(peer)}), 53), Data: []byte(data)}
}

// packetWriter fails for the peers of its list.
type packetWriter struct {
	bad   map[netip.AddrPort]error
	wrote []string
}

func (w *packetWriter) WriteBatch(dgs []flow.Datagram) (int, error) {
	for i, d := range dgs {
		if err := w.bad[d.Peer]; err != nil {
			return i, err
		}
		w.wrote = append(w.wrote, string(d.Data))
	}
	return len(dgs), nil
}

func TestSendGoesOnAfterAPeersFailure(t *testing.T) {
	one, two, three := dg(1, "a"), dg(2, "b"), dg(3, "c")
	refused := &flow.PeerError{Peer: two.Peer, Reason: flow.Refused, Err: unix.ECONNREFUSED}
	tests := []struct {
		name   string
		bad    map[netip.AddrPort]error
		dgs    []flow.Datagram
		wrote  []string
		failed int
		err    error
	}{
		{"all well", nil, []flow.Datagram{one, two, three}, []string{"a", "b", "c"}, 0, nil},
		{"none", nil, nil, nil, 0, nil},
		{"one peer fails", map[netip.AddrPort]error{two.Peer: refused}, []flow.Datagram{one, two, three, two}, []string{"a", "c"}, 2, nil},
		{"the conn fails", map[netip.AddrPort]error{three.Peer: io.ErrClosedPipe}, []flow.Datagram{one, three, two}, []string{"a"}, 0, io.ErrClosedPipe},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := &packetWriter{bad: tt.bad}
			failed := 0
			err := relay.Send(w, tt.dgs, func(e *flow.PeerError) { failed++ })
			if !errors.Is(err, tt.err) || failed != tt.failed || !slices.Equal(w.wrote, tt.wrote) {
				t.Errorf("wrote %v, %d failed, %v", w.wrote, failed, err)
			}
		})
	}
}

// packetReader gives one script entry a call.
type packetReader struct{ script []any }

func (r *packetReader) ReadBatch(dgs []flow.Datagram) (int, error) {
	next := r.script[0]
	r.script = r.script[1:]
	if err, ok := next.(error); ok {
		return 0, err
	}
	d := next.(flow.Datagram)
	d.Data = dgs[0].Data[:copy(dgs[0].Data, d.Data)]
	dgs[0] = d
	return 1, nil
}

// lendingReader does the same, with buffers of its own.
type lendingReader struct {
	packetReader
	lent int
}

func (r *lendingReader) ReadLent(dgs []flow.Datagram) (int, error) {
	r.lent++
	dgs[0].Data = make([]byte, 64<<10)
	return r.ReadBatch(dgs)
}

func TestPacketsMovesUntilTheEnd(t *testing.T) {
	script := func() []any {
		return []any{
			dg(1, "a"),
			&flow.PeerError{Peer: dg(2, "").Peer, Reason: flow.Refused, Err: unix.ECONNREFUSED},
			dg(2, "b"), dg(1, ""), io.EOF,
		}
	}
	lending := &lendingReader{packetReader: packetReader{script()}}
	for name, reader := range map[string]relay.PacketReader{"plain": &packetReader{script()}, "lending": lending} {
		w := &packetWriter{}
		var seen, failed int
		err := relay.Packets(w, reader, relay.PacketOptions{
			Seen:   func(dgs []flow.Datagram) { seen += len(dgs) },
			Failed: func(e *flow.PeerError) { failed++ },
		})
		if !errors.Is(err, io.EOF) || seen != 3 || failed != 1 || !slices.Equal(w.wrote, []string{"a", "b", ""}) {
			t.Errorf("%s: wrote %q, saw %d, %d failed, %v", name, w.wrote, seen, failed, err)
		}
	}
	if lending.lent != 5 {
		t.Errorf("asked for a loan %d times, want 5", lending.lent)
	}
}
