package stack

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	gvstack "gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	gvudp "gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"cgtun/flow"
	"cgtun/tun"
)

// Queue is one queue of a device; *tun.Queue is one. ReadPacket is called by one
// goroutine, beside WritePacket, which is called by many.
type Queue interface {
	ReadPacket(bufs [][]byte) (tun.Offload, int, error)
	WritePacket(o tun.Offload, slices [][]byte) error
	// SetReadDeadline lets a ReadPacket that waits return at t. The zero
	// time: never.
	SetReadDeadline(t time.Time) error
}

// Options of a stack. Zero values mean the defaults.
type Options struct {
	Attachment string // its id, for the flows
	MTU        int    // of the device, in bytes. Default 1,500
	// Local says whether an address belongs to the namespace of the device,
	// or is routed to it: packets from all others are dropped. It is asked
	// for every packet, so it has to be fast. Nil: all are.
	Local func(netip.Addr) bool
	// Addresses are the device's: from the first of a family comes what the
	// stack itself has to say by ICMP. None: from whom the packet was for.
	Addresses []netip.Addr
	Logger    *slog.Logger // nil: silent
	TCP       TCPOptions
	UDP       UDPOptions
}

// TCPOptions bound the stream side of a stack. Zero values mean the defaults.
type TCPOptions struct {
	// Pending is how many clients may wait for their outbound or for the end
	// of their handshake; beyond it the oldest goes, without an answer.
	// Default 4,096: each may hold an outbound socket.
	Pending int
	// PendingPerSource and PendingPerDestination are the same for one client
	// address and for one destination address. Defaults: half of Pending.
	PendingPerSource, PendingPerDestination int
	// Buffer is the largest receive and the largest send buffer of one
	// connection, in bytes. They begin smaller and grow with need. Default
	// 4 MiB.
	Buffer int
	// Buffers makes them smaller when all stacks that have it hold too much.
	// Default: one of the stack's own, whose Fit nobody calls.
	Buffers *Buffers
	// Linger is how long a closed connection may take to get rid of what was
	// written before, without any progress. Default 60 s.
	Linger time.Duration
	// KeepAlive is the silence after which a client is asked whether it is
	// still there, six times every ten seconds. Default 2 minutes.
	KeepAlive time.Duration
}

func (o *Options) setDefaults() {
	o.MTU = orDefault(o.MTU, 1500)
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Local == nil {
		o.Local = func(netip.Addr) bool { return true }
	}
	t := &o.TCP
	t.Pending = orDefault(t.Pending, 4096)
	t.PendingPerSource = orDefault(t.PendingPerSource, max(1, t.Pending/2))
	t.PendingPerDestination = orDefault(t.PendingPerDestination, max(1, t.Pending/2))
	t.Buffer = orDefault(t.Buffer, 4<<20)
	if t.Buffers == nil {
		t.Buffers = NewBuffers()
	}
	t.Linger = orDefault(t.Linger, time.Minute)
	t.KeepAlive = orDefault(t.KeepAlive, 2*time.Minute)
}

const nicID tcpip.NICID = 1

// Stack is the netstack of one attachment.
type Stack struct {
	o      Options
	queues []Queue
	gv     *gvstack.Stack
	link   *link
	tcp    *streams
	udp    *udp
	echo   *udp // ICMP echo: a session an identifier
	count  counters
	past   time.Time
	own    ownAddresses

	fragments fragments
}

// New makes a stack on the queues of a device. Nothing happens before Run,
// which must be called: it is what takes the stack away.
func New(queues []Queue, h flow.Handler, o Options) (*Stack, error) {
	if len(queues) == 0 {
		return nil, errors.New("make stack: no queue")
	}
	o.setDefaults()
	s := &Stack{o: o, queues: queues, past: time.Unix(1, 0), own: newOwnAddresses(o.Addresses)}
	s.fragments.s = s
	s.link = newLink(queues, uint32(o.MTU), &s.count)
	s.gv = gvstack.New(gvstack.Options{
		NetworkProtocols: []gvstack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol},
		TransportProtocols: []gvstack.TransportProtocolFactory{
			tcp.NewProtocol, gvudp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6,
		},
	})
	s.udp = newUDP(udpConfig{UDPOptions: o.UDP, Attachment: o.Attachment, Own: s.own, Proto: flow.UDP, Handler: h, Tight: o.TCP.Buffers.tight.Load, Write: s.link.write})
	echo := o.UDP
	echo.Left = nil // it is about ports
	echo.Idle = orDefault(echo.Idle, echoIdle)
	echo.IdleMany = orDefault(echo.IdleMany, echo.Idle) // RFC 5508 REQ-2
	s.echo = newUDP(udpConfig{UDPOptions: echo, Attachment: o.Attachment, Own: s.own, Proto: flow.ICMP, Handler: h, Tight: o.TCP.Buffers.tight.Load, Write: s.link.write})
	s.tcp = newStreams(s, h)
	if err := s.setUp(); err != nil {
		s.gv.Destroy()
		return nil, fmt.Errorf("make stack: %w", err)
	}
	return s, nil
}

// setUp makes the NIC one that takes packets for every address and sends from
// every address.
func (s *Stack) setUp() error {
	for _, set := range s.tcp.protocolOptions() {
		if err := s.gv.SetTransportProtocolOption(tcp.ProtocolNumber, set); err != nil {
			return fmt.Errorf("set tcp option %T: %v", set, err)
		}
	}
	if err := s.gv.CreateNICWithOptions(nicID, s.link, gvstack.NICOptions{}); err != nil {
		return fmt.Errorf("create nic: %v", err)
	}
	if err := s.gv.SetPromiscuousMode(nicID, true); err != nil {
		return fmt.Errorf("set promiscuous mode: %v", err)
	}
	if err := s.gv.SetSpoofing(nicID, true); err != nil {
		return fmt.Errorf("set spoofing: %v", err)
	}
	s.gv.SetRouteTable([]tcpip.Route{
		{Destination: header.IPv4EmptySubnet, NIC: nicID},
		{Destination: header.IPv6EmptySubnet, NIC: nicID},
	})
	s.gv.SetTransportProtocolHandler(tcp.ProtocolNumber, s.tcp.handle)
	s.gv.SetTransportProtocolHandler(gvudp.ProtocolNumber, s.reassembled)
	// Without these netstack would answer pings for every address on earth.
	s.gv.SetTransportProtocolHandler(icmp.ProtocolNumber4, s.takeICMP)
	s.gv.SetTransportProtocolHandler(icmp.ProtocolNumber6, s.takeICMP)
	return nil
}

// reassembled takes the UDP datagrams that went through netstack because they
// came in fragments or behind extension headers.
func (s *Stack) reassembled(id gvstack.TransportEndpointID, pkt *gvstack.PacketBuffer) bool {
	payload := pkt.Data().AsRange().ToSlice()
	udp := header.UDP(pkt.TransportHeader().Slice())
	if len(udp) < header.UDPMinimumSize || int(udp.Length()) != len(udp)+len(payload) {
		s.count.malformed.Add(1)
		return true
	}
	if udp.Checksum() != 0 || id.LocalAddress.Len() == header.IPv6AddressSize {
		sum := header.PseudoHeaderChecksum(header.UDPProtocolNumber, id.RemoteAddress, id.LocalAddress, udp.Length())
		if checksum.Checksum(payload, checksum.Checksum(udp, sum)) != 0xffff {
			s.count.badSum.Add(1)
			return true
		}
	}
	s.udp.deliverReassembled(addrPort(id.RemoteAddress, id.RemotePort), addrPort(id.LocalAddress, id.LocalPort), ttlOf(pkt), payload)
	return true
}

// Run serves until ctx ends (then its error is nil) or the device does (then
// the error wraps os.ErrClosed or netns.ErrGone). Before it returns, all flows
// have ended and all goroutines of the stack are gone. It can be called once.
func (s *Stack) Run(ctx context.Context) error {
	flows, cancel := context.WithCancel(ctx)
	defer cancel()
	s.tcp.begin(flows)
	var readers, sides sync.WaitGroup
	broken := make(chan error, len(s.queues))
	for _, q := range s.queues {
		if err := q.SetReadDeadline(time.Time{}); err != nil {
			broken <- fmt.Errorf("read device: %w", err)
			continue
		}
		readers.Go(func() {
			r := newReader(s, q)
			defer r.close()
			if err := r.run(); err != nil {
				broken <- err
			}
		})
	}
	sides.Go(func() { _ = s.udp.run(flows) })
	sides.Go(func() { _ = s.echo.run(flows) })
	sides.Go(func() { s.tcp.run(flows) })
	sides.Go(func() { s.trim(flows) })
	sides.Go(func() { s.link.answer(flows) })

	var err error
	select {
	case <-ctx.Done():
	case err = <-broken:
	}
	cancel()
	sides.Wait() // with them all handlers
	s.stopReaders()
	readers.Wait()
	s.tcp.endHandshakes()
	s.gv.Destroy()
	return err
}

// stopReaders ends the readers of a device that stays open.
func (s *Stack) stopReaders() {
	for _, q := range s.queues {
		_ = q.SetReadDeadline(s.past)
	}
}

// ttlOf is the TTL or hop limit of a packet that netstack has taken.
func ttlOf(pkt *gvstack.PacketBuffer) uint8 {
	h := pkt.NetworkHeader().Slice()
	at := 8
	if pkt.NetworkProtocolNumber == header.IPv6ProtocolNumber {
		at = 7
	}
	if len(h) <= at {
		return 1
	}
	return h[at]
}

func addrPort(a tcpip.Address, port uint16) netip.AddrPort {
	ip, _ := netip.AddrFromSlice(a.AsSlice())
	return netip.AddrPortFrom(ip, port)
}
