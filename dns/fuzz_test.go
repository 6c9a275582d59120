package dns

import (
	"bytes"
	"testing"

	wire "github.com/miekg/dns"
)

// A query that is taken is one for the library too, and what upstreams are asked
// has the same question.
func FuzzQuery(f *testing.F) {
	for _, kind := range []uint16{wire.TypeA, wire.TypeHTTPS, 65300} {
		m := question("www.example.org", kind)
		b, _ := m.Pack()
		f.Add(b)
		m.SetEdns0(1232, true)
		b, _ = m.Pack()
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		q, ok := parseQuery(b, false)
		if !ok {
			return
		}
		var m, up wire.Msg
		if err := m.Unpack(b); err != nil {
			return // an option that the library does not like
		}
		if len(m.Question) != 1 || m.Response || m.Question[0].Qtype != q.kind {
			t.Fatalf("taken: %v", m)
		}
		if err := up.Unpack(q.upstream(7, true)); err != nil || up.Question[0] != m.Question[0] || up.IsEdns0() == nil {
			t.Fatalf("upstream: %v %v", err, up)
		}
		var fail wire.Msg
		if err := fail.Unpack(q.failed(2).render(&q, 0, false)); err != nil || fail.Rcode != 2 || fail.Id != q.id {
			t.Fatalf("failed: %v %v", err, fail)
		}
	})
}

// Whatever comes for an answer, what a client gets is a message, with its
// question and no longer than it takes.
func FuzzAnswer(f *testing.F) {
	q := question("www.example.org", wire.TypeA)
	q.SetEdns0(1232, false)
	ask, err := q.Pack()
	if err != nil {
		f.Fatal(err)
	}
	for _, s := range []serve{answers(0, "300 A 192.0.2.7"), answers(3, "30 SOA ns. root. 1 1 1 1 30"), truncated} {
		s(q, func(m *wire.Msg) {
			m.Compress = true
			b, err := m.Pack()
			if err != nil {
				f.Fatal(err)
			}
			f.Add(b)
		})
	}
	mine, ok := parseQuery(ask, false)
	if !ok {
		f.Fatal("not taken")
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < 2 {
			return
		}
		kept := bytes.Clone(b)
		a, err := mine.parseAnswer(b, uint16(b[0])<<8|uint16(b[1]))
		if !bytes.Equal(b, kept) {
			t.Fatal("the message was changed")
		}
		if err != nil {
			return
		}
		for _, stale := range []bool{false, true} {
			out := a.render(&mine, 10, stale)
			var m wire.Msg
			if err := m.Unpack(out); err != nil || len(out) > mine.limit || m.Id != mine.id || len(m.Question) != 1 || m.Question[0] != q.Question[0] {
				t.Fatalf("%d bytes, %v: %v", len(out), err, m)
			}
		}
	})
}

// The files that name resolvers are read by nobody else.
func FuzzHost(f *testing.F) {
	f.Add("nameserver 192.0.2.1\nnameserver ::1 # x\n")
	f.Fuzz(func(t *testing.T, text string) {
		h := &host{read: func(string) ([]byte, error) { return []byte(text), nil }}
		if n := len(h.list("x")); n > maxHost {
			t.Fatalf("%d servers", n)
		}
	})
}
