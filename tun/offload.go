package tun

import (
	"encoding/binary"
	"fmt"
)

// The kinds of segments of GSOType, from virtio_net.h.
const (
	GSONone  = 0
	GSOTCPv4 = 1
	GSOTCPv6 = 4
	GSOUDPL4 = 5    // USO: Data is several datagrams of GSOSize bytes
	gsoECN   = 0x80 // a bit beside the type: the first packet has CWR
)

// headerLen is the length of a virtio_net_hdr without merged buffers, which is
// what a tun has unless TUNSETVNETHDRSZ says otherwise.
const headerLen = 10

const (
	flagNeedsCsum = 1
	flagDataValid = 2
)

// Offload is what is left to be done to a packet, and what needs no doing: the
// virtio-net header. The zero Offload is a packet that is complete.
type Offload struct {
	GSOType uint8  // GSONone: an ordinary packet
	GSOSize uint16 // payload bytes of each packet it stands for
	HdrLen  uint16 // IP and transport headers together; a hint

	CsumStart  uint16 // where summing starts, from the start of the packet
	CsumOffset uint16 // where the sum goes, from CsumStart

	NeedsCsum bool // the sum covers the pseudo-header only; the rest is to be added
	DataValid bool // the sum was checked
}

// put writes the header to b, which has headerLen bytes.
func (o *Offload) put(b []byte) {
	b[0] = 0
	if o.NeedsCsum {
		b[0] |= flagNeedsCsum
	}
	if o.DataValid {
		b[0] |= flagDataValid
	}
	b[1] = o.GSOType
	binary.LittleEndian.PutUint16(b[2:], o.HdrLen)
	binary.LittleEndian.PutUint16(b[4:], o.GSOSize)
	binary.LittleEndian.PutUint16(b[6:], o.CsumStart)
	binary.LittleEndian.PutUint16(b[8:], o.CsumOffset)
}

// parse reads the header from b, which has headerLen bytes. The ECN bit is
// dropped: the stack looks at the TCP flags themselves.
func (o *Offload) parse(b []byte) error {
	*o = Offload{
		GSOType:    b[1] &^ gsoECN,
		HdrLen:     binary.LittleEndian.Uint16(b[2:]),
		GSOSize:    binary.LittleEndian.Uint16(b[4:]),
		CsumStart:  binary.LittleEndian.Uint16(b[6:]),
		CsumOffset: binary.LittleEndian.Uint16(b[8:]),
		NeedsCsum:  b[0]&flagNeedsCsum != 0,
		DataValid:  b[0]&flagDataValid != 0,
	}
	switch o.GSOType {
	case GSONone, GSOTCPv4, GSOTCPv6, GSOUDPL4:
		return nil
	}
	return fmt.Errorf("read packet: unknown kind of segment %d", o.GSOType)
}
