package flow_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"cgtun/flow"
	"cgtun/internal/labtest"
)

func TestMain(m *testing.M) { labtest.Main(m) }

func TestReasonOf(t *testing.T) {
	connect := func(errno error) error {
		return &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", errno)}
	}
	tests := []struct {
		name string
		err  error
		want flow.Reason
	}{
		{"nothing", nil, flow.Closed},
		{"refused", connect(unix.ECONNREFUSED), flow.Refused},
		{"no route to host", connect(unix.EHOSTUNREACH), flow.HostUnreachable},
		{"no route", connect(unix.ENETUNREACH), flow.NetUnreachable},
		{"no address of that family", connect(unix.EADDRNOTAVAIL), flow.NetUnreachable},
		{"firewall", connect(unix.EPERM), flow.Prohibited},
		{"kernel time-out", connect(unix.ETIMEDOUT), flow.TimedOut},
		{"reset", connect(unix.ECONNRESET), flow.Reset},
		{"write after reset", connect(unix.EPIPE), flow.Reset},
		{"datagram larger than the path", connect(unix.EMSGSIZE), flow.TooBig},
		{"deadline of a context", fmt.Errorf("dial: %w", context.DeadlineExceeded), flow.TimedOut},
		{"deadline of a conn", os.ErrDeadlineExceeded, flow.TimedOut},
		{"canceled", fmt.Errorf("dial: %w", context.Canceled), flow.Canceled},
		{"its own word wins", fmt.Errorf("send: %w", &flow.PeerError{Reason: flow.Prohibited, Err: unix.ECONNREFUSED}), flow.Prohibited},
		{"something else", errors.New("broken"), flow.Unknown},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := flow.ReasonOf(tt.err); got != tt.want {
				t.Errorf("ReasonOf(%v) = %v, want %v", tt.err, got, tt.want)
			}
		})
	}
}

func TestReasonsHaveWords(t *testing.T) {
	for r := flow.Unknown; r <= flow.Canceled; r++ {
		if r.String() == "" {
			t.Errorf("reason %d has no word", uint8(r))
		}
	}
}

func TestIDsAreUnique(t *testing.T) {
	var zero netip.AddrPort
	a, b := flow.New(flow.TCP, zero, zero, "home"), flow.New(flow.UDP, zero, zero, "home")
	if a.ID == 0 || a.ID == b.ID {
		t.Errorf("ids %d and %d, want two that differ and are not 0", a.ID, b.ID)
	}
}
