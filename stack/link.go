package stack

import (
	"context"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	gvstack "gvisor.dev/gvisor/pkg/tcpip/stack"

	"cgtun/tun"
)

const (
	// maxSegment is the largest packet with its headers that netstack may
	// hand over in one piece.
	maxSegment = 65535
	// linkSlices is how many pieces a packet ordinarily has at most: headers
	// and the views of a segment.
	linkSlices = 32
)

// link is the netstack's way to the device. gVisor's own (fdbased) switches
// segmentation offload on for sockets only, not for a tun.
//
// It claims that checksums of received packets were verified, because netstack
// would go by that claim alone for all packets: the reader verifies the few that
// need it. It does not claim to finish checksums of sent packets: netstack would
// then leave those of packets without segmentation options empty, SYN-ACKs too.
type link struct {
	queues []Queue
	mtu    uint32
	count  *counters
	to     gvstack.NetworkDispatcher
	pool   sync.Pool // of *[][]byte

	// SYN-ACKs, for answer. netstack sends them with the endpoint locked, and
	// the client's kernel answers within write(2): until that returned, the
	// processor that got the answer would try the lock in a busy loop, on the
	// CPU that write(2), or the client, may be waiting for.
	answers   chan *gvstack.PacketBuffer
	answering atomic.Bool
}

// maxAnswers bounds the SYN-ACKs that wait for answer; beyond it they are
// written at once.
const maxAnswers = 256

func newLink(queues []Queue, mtu uint32, count *counters) *link {
	l := &link{queues: queues, mtu: mtu, count: count, answers: make(chan *gvstack.PacketBuffer, maxAnswers)}
	l.pool.New = func() any {
		s := make([][]byte, 0, linkSlices)
		return &s
	}
	return l
}

// write puts one packet into the device. Safe for concurrent use.
func (l *link) write(o tun.Offload, slices [][]byte) error {
	return l.queues[0].WritePacket(o, slices)
}

// WritePackets implements gvstack.LinkWriter. Packets of one connection always
// take the same queue: the kernel then brings those of the other direction to
// that queue's reader, in order.
func (l *link) WritePackets(list gvstack.PacketBufferList) (int, tcpip.Error) {
	for n, pkt := range list.AsSlice() {
		if l.postpone(pkt) {
			continue
		}
		if err := l.writePacket(pkt); err != nil {
			l.count.unwritten.Add(1)
			if tun.IsEnd(err) {
				return n, &tcpip.ErrClosedForSend{}
			}
			// Lost, as on any link: TCP sends it again.
		}
	}
	return list.Len(), nil
}

// postpone leaves a SYN-ACK to answer.
func (l *link) postpone(pkt *gvstack.PacketBuffer) bool {
	h := header.TCP(pkt.TransportHeader().Slice())
	if pkt.TransportProtocolNumber != header.TCPProtocolNumber || len(h) < header.TCPMinimumSize || !h.Flags().Contains(header.TCPFlagSyn) || !l.answering.Load() {
		return false
	}
	select {
	case l.answers <- pkt.IncRef():
		return true
	default:
		pkt.DecRef()
		return false
	}
}

// answer writes SYN-ACKs until ctx ends. One that cannot be written is sent
// again by TCP.
func (l *link) answer(ctx context.Context) {
	l.answering.Store(true)
	defer func() {
		l.answering.Store(false)
		for len(l.answers) > 0 {
			(<-l.answers).DecRef()
		}
	}()
	for {
		select {
		case <-ctx.Done():
			return
		case pkt := <-l.answers:
			if l.writePacket(pkt) != nil {
				l.count.unwritten.Add(1)
			}
			pkt.DecRef()
		}
	}
}

func (l *link) writePacket(pkt *gvstack.PacketBuffer) error {
	q := l.queues[int(pkt.Hash)%len(l.queues)]
	scratch := l.pool.Get().(*[][]byte)
	slices := (*scratch)[:0]
	views, skip := pkt.AsViewList()
	for v := views.Front(); v != nil; v = v.Next() {
		b := v.AsSlice()
		if skip >= len(b) {
			skip -= len(b)
			continue
		}
		slices = append(slices, b[skip:])
		skip = 0
	}
	err := q.WritePacket(offloadOf(pkt), slices)
	clear(slices)
	*scratch = slices[:0]
	l.pool.Put(scratch)
	return err
}

// offloadOf says what is left to be done to a packet of netstack's.
func offloadOf(pkt *gvstack.PacketBuffer) (o tun.Offload) {
	gso := &pkt.GSOOptions
	if gso.Type == gvstack.GSONone {
		return o
	}
	if gso.NeedsCsum {
		o.NeedsCsum = true
		o.CsumStart = gso.L3HdrLen
		o.CsumOffset = gso.CsumOffset
	}
	if pkt.Data().Size() <= int(gso.MSS) {
		return o
	}
	switch gso.Type {
	case gvstack.GSOTCPv4:
		o.GSOType = tun.GSOTCPv4
	case gvstack.GSOTCPv6:
		o.GSOType = tun.GSOTCPv6
	default:
		return o
	}
	o.GSOSize = gso.MSS
	o.HdrLen = uint16(pkt.HeaderSize())
	return o
}

// GSOMaxSize implements gvstack.GSOEndpoint.
func (l *link) GSOMaxSize() uint32 { return maxSegment }

// SupportedGSO implements gvstack.GSOEndpoint.
func (l *link) SupportedGSO() gvstack.SupportedGSO { return gvstack.HostGSOSupported }

// Capabilities implements gvstack.LinkEndpoint.
func (l *link) Capabilities() gvstack.LinkEndpointCapabilities {
	return gvstack.CapabilityRXChecksumOffload
}

// MTU implements gvstack.LinkEndpoint.
func (l *link) MTU() uint32 { return l.mtu }

// SetMTU implements gvstack.LinkEndpoint; the device's stays as it is.
func (l *link) SetMTU(uint32) {}

// Attach implements gvstack.LinkEndpoint. It is called before any reader runs.
func (l *link) Attach(d gvstack.NetworkDispatcher) { l.to = d }

// IsAttached implements gvstack.LinkEndpoint.
func (l *link) IsAttached() bool { return l.to != nil }

// MaxHeaderLength implements gvstack.LinkEndpoint: a tun has no link header.
func (l *link) MaxHeaderLength() uint16 { return 0 }

// LinkAddress implements gvstack.LinkEndpoint.
func (l *link) LinkAddress() tcpip.LinkAddress { return "" }

// SetLinkAddress implements gvstack.LinkEndpoint.
func (l *link) SetLinkAddress(tcpip.LinkAddress) {}

// ARPHardwareType implements gvstack.LinkEndpoint.
func (l *link) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareNone }

// AddHeader implements gvstack.LinkEndpoint.
func (l *link) AddHeader(*gvstack.PacketBuffer) {}

// ParseHeader implements gvstack.LinkEndpoint.
func (l *link) ParseHeader(*gvstack.PacketBuffer) bool { return true }

// Wait implements gvstack.LinkEndpoint: the readers are waited for by Run.
func (l *link) Wait() {}

// Close implements gvstack.LinkEndpoint: the device belongs to who opened it.
func (l *link) Close() {}

// SetOnCloseAction implements gvstack.LinkEndpoint.
func (l *link) SetOnCloseAction(func()) {}
