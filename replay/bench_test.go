package replay_test

import (
	"testing"

	"cgtun/dialer"
	"cgtun/replay"
)

// BenchmarkWatch is what relay does for a flow of which nothing goes wrong.
func BenchmarkWatch(b *testing.B) {
	server := &dialer.Conn{Path: []string{"a"}}
	request := [][]byte{[]byte(get)}
	b.ReportAllocs()
	for b.Loop() {
		w := replay.NewWatch(server, 80, true)
		if !w.Next(request, len(get)) || w.Sent(len(get)).IsZero() {
			b.Fatal("a request is not watched")
		}
		if !w.ServerSpeaks() {
			b.Fatal("an answer is not given on")
		}
	}
}
