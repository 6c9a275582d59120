package steer

import (
	"encoding/binary"
	"errors"
	"fmt"

	mdl "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A throw route has no device, and so stays when ours is gone. One that hangs
// on a nexthop object (Linux 5.3, see ip-nexthop(8)) of our device goes with
// that, although it never uses it.

// Attributes of linux/nexthop.h and linux/rtnetlink.h.
const (
	nhaID, nhaOIF = 1, 5
	rtaNhID       = 30
)

func word(n uint32) []byte { return binary.NativeEndian.AppendUint32(nil, n) }

// nexthops makes nexthop objects in the namespace of the calling thread.
type nexthops struct {
	conn *mdl.Conn
	link int
	ids  map[byte]uint32 // by family; 0: it is refused
}

func (n *nexthops) dial() (err error) {
	if n.conn == nil {
		n.conn, err = mdl.Dial(unix.NETLINK_ROUTE, nil)
		n.ids = map[byte]uint32{}
	}
	if err != nil {
		n.conn = nil
		return fmt.Errorf("open route netlink: %w", err)
	}
	return nil
}

func (n *nexthops) close() {
	if n.conn != nil {
		n.conn.Close()
	}
}

// id returns the object of our device in a family, or 0 where there can be
// none: then a route without is the best there is.
func (n *nexthops) id(family byte) uint32 {
	if id, ok := n.ids[family]; ok {
		return id
	}
	if n.dial() != nil {
		return 0
	}
	id := n.find(family)
	if id == 0 {
		if _, err := n.conn.Execute(n.message(unix.RTM_NEWNEXTHOP, family, mdl.Acknowledge|mdl.Create|mdl.Excl)); err == nil {
			id = n.find(family)
		}
	}
	n.ids[family] = id
	return id
}

// find looks for an object that was made before.
func (n *nexthops) find(family byte) uint32 {
	found, err := n.conn.Execute(n.message(unix.RTM_GETNEXTHOP, family, mdl.Dump))
	if err != nil {
		return 0
	}
	for _, m := range found {
		if len(m.Data) < 8 || m.Data[0] != family || m.Data[2] != Protocol { // struct nhmsg
			continue
		}
		attrs, err := mdl.UnmarshalAttributes(m.Data[8:])
		if err != nil {
			continue
		}
		var id, oif uint32
		for _, a := range attrs {
			switch {
			case len(a.Data) != 4:
			case a.Type == nhaID:
				id = binary.NativeEndian.Uint32(a.Data)
			case a.Type == nhaOIF:
				oif = binary.NativeEndian.Uint32(a.Data)
			}
		}
		if oif == uint32(n.link) {
			return id
		}
	}
	return 0
}

func (n *nexthops) message(kind int, family byte, flags mdl.HeaderFlags) mdl.Message {
	head := []byte{family, 0, Protocol, 0, 0, 0, 0, 0} // struct nhmsg
	if flags&mdl.Dump == mdl.Dump {
		head[2] = 0 // the kernel lists those of a device, not of a protocol
	}
	oif := attribute(nhaOIF, word(uint32(n.link)))
	return mdl.Message{
		Header: mdl.Header{Type: mdl.HeaderType(kind), Flags: mdl.Request | flags},
		Data:   append(head, oif...),
	}
}

// throw sets a throw route that hangs on an object.
func (n *nexthops) throw(k routeKey, table int, id uint32, flags mdl.HeaderFlags) error {
	data := []byte{byte(familyOf(k.dst.Addr())), byte(k.dst.Bits()), 0, 0, unix.RT_TABLE_UNSPEC, Protocol, unix.RT_SCOPE_UNIVERSE, unix.RTN_THROW, 0, 0, 0, 0}
	data = append(data, attribute(unix.RTA_DST, k.dst.Addr().AsSlice())...)
	data = append(data, attribute(unix.RTA_TABLE, word(uint32(table)))...)
	data = append(data, attribute(rtaNhID, word(id))...)
	_, err := n.conn.Execute(mdl.Message{
		Header: mdl.Header{Type: unix.RTM_NEWROUTE, Flags: mdl.Request | mdl.Acknowledge | mdl.Create | flags},
		Data:   data,
	})
	if err != nil {
		return fmt.Errorf("with nexthop %d: %w", id, err)
	}
	return nil
}

// delNexthops deletes the objects that these routes hung on, as they stay for
// as long as the device.
func delNexthops(family byte, routes []netlink.Route) error {
	links := map[int]bool{}
	for _, r := range routes {
		if link := keyOf(&r).link; r.Type == unix.RTN_THROW && link != 0 {
			links[link] = true
		}
	}
	var errs []error
	for link := range links {
		n := nexthops{link: link}
		if err := n.dial(); err != nil {
			errs = append(errs, err)
			continue
		}
		if id := n.find(family); id != 0 {
			m := mdl.Message{
				Header: mdl.Header{Type: unix.RTM_DELNEXTHOP, Flags: mdl.Request | mdl.Acknowledge},
				Data:   append(make([]byte, 8), attribute(nhaID, word(id))...),
			}
			if _, err := n.conn.Execute(m); err != nil && !errors.Is(err, unix.ENOENT) {
				errs = append(errs, fmt.Errorf("delete nexthop %d: %w", id, err))
			}
		}
		n.close()
	}
	return errors.Join(errs...)
}

// attribute is one rtnetlink attribute; all of ours are of whole words or
// addresses, and need no padding.
func attribute(kind uint16, data []byte) []byte {
	b := binary.NativeEndian.AppendUint16(binary.NativeEndian.AppendUint16(nil, uint16(4+len(data))), kind)
	return append(b, data...)
}
