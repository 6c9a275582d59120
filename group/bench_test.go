package group_test

import (
	"context"
	"log/slog"
	"testing"

	"cgtun/dialer"
	"cgtun/group"
)

// instant connects at once, to nothing.
type instant struct{ name string }

func (i *instant) Name() string { return i.name }
func (i *instant) DialStream(context.Context, dialer.Target) (*dialer.Conn, error) {
	return &dialer.Conn{Path: []string{i.name}}, nil
}
func (i *instant) OpenPackets(context.Context, dialer.Target) (*dialer.PacketConn, error) {
	return nil, nil
}

// BenchmarkDial is what a race costs where nothing else does.
func BenchmarkDial(b *testing.B) {
	s := group.NewScores(slog.New(slog.DiscardHandler), nil)
	g, _ := group.New(settings("race"), []dialer.Outbound{&instant{"a"}, &instant{"b"}}, s)
	b.ReportAllocs()
	for b.Loop() {
		c, err := g.DialStream(context.Background(), dst(1))
		if err != nil {
			b.Fatal(err)
		}
		c.Tell(dialer.Outcome{News: dialer.Answered})
		c.Tell(dialer.Outcome{News: dialer.Ended})
	}
}
