package steer

import (
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// The parts of a rule, named as nft(8) writes them. Each works in register 1
// and leaves nothing in it for the next.

type part = []expr.Any

func host32(v uint32) []byte { return binaryutil.NativeEndian.PutUint32(v) }

func equal(data []byte) expr.Any {
	return &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: data}
}

func differs(data []byte) expr.Any {
	return &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: data}
}

// bits is register = register & and ^ xor.
func bits(and, xor uint32) expr.Any {
	return &expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: host32(and), Xor: host32(xor)}
}

func meta(key expr.MetaKey) expr.Any { return &expr.Meta{Key: key, Register: 1} }

func ct(key expr.CtKey) expr.Any { return &expr.Ct{Key: key, Register: 1} }

// name is an interface name as the kernel compares it: all 16 bytes.
func name(s string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, s)
	return b
}

func iif(dev string) part    { return part{meta(expr.MetaKeyIIFNAME), equal(name(dev))} }
func iifNot(dev string) part { return part{meta(expr.MetaKeyIIFNAME), differs(name(dev))} }
func oif(dev string) part    { return part{meta(expr.MetaKeyOIFNAME), equal(name(dev))} }
func oifNot(dev string) part { return part{meta(expr.MetaKeyOIFNAME), differs(name(dev))} }

func iifIn(set *nftables.Set) part { return part{meta(expr.MetaKeyIIFNAME), lookup(set)} }
func oifIn(set *nftables.Set) part { return part{meta(expr.MetaKeyOIFNAME), lookup(set)} }

func lookup(set *nftables.Set) *expr.Lookup {
	return &expr.Lookup{SourceRegister: 1, SetName: set.Name, SetID: set.ID}
}

// daddrLeaves and saddrLeaves are the device by which an unmarked packet to
// that address would leave. Only prerouting may ask.
func daddrLeaves() expr.Any {
	return &expr.Fib{Register: 1, FlagDADDR: true, ResultOIFNAME: true}
}

func saddrLeaves() expr.Any {
	return &expr.Fib{Register: 1, FlagSADDR: true, ResultOIFNAME: true}
}

// notBehind is a device that is not in the set.
func notBehind(leaves expr.Any, set *nftables.Set) part {
	not := lookup(set)
	not.Invert = true
	return part{leaves, not}
}

func iifGroupNot(group uint32) part {
	return part{meta(expr.MetaKeyIIFGROUP), differs(host32(group))}
}

// masked is load, & mask, == value; a full mask needs no bitwise.
func masked(load expr.Any, mask, value uint32) part {
	p := part{load}
	if mask != ^uint32(0) {
		p = append(p, bits(mask, 0))
	}
	return append(p, equal(host32(value)))
}

func markIs(mask, value uint32) part   { return masked(meta(expr.MetaKeyMARK), mask, value) }
func ctMarkIs(mask, value uint32) part { return masked(ct(expr.CtKeyMARK), mask, value) }

// setMark is meta mark set meta mark & ~mask ^ value.
func setMark(mask, value uint32) part {
	return part{
		meta(expr.MetaKeyMARK), bits(^mask, value),
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: 1},
	}
}

// setCtMark is ct mark set ct mark & ~mask ^ value.
func setCtMark(mask, value uint32) part {
	return part{
		ct(expr.CtKeyMARK), bits(^mask, value),
		&expr.Ct{Key: expr.CtKeyMARK, SourceRegister: true, Register: 1},
	}
}

func original() part { return part{ct(expr.CtKeyDIRECTION), equal([]byte{0})} }
func reply() part    { return part{ct(expr.CtKeyDIRECTION), equal([]byte{1})} }

func tcp() part    { return part{meta(expr.MetaKeyL4PROTO), equal([]byte{unix.IPPROTO_TCP})} }
func udp() part    { return part{meta(expr.MetaKeyL4PROTO), equal([]byte{unix.IPPROTO_UDP})} }
func notTCP() part { return part{meta(expr.MetaKeyL4PROTO), differs([]byte{unix.IPPROTO_TCP})} }

// syn is tcp flags & (syn | ack) == syn: the first packet of a connection.
func syn() part {
	const flags, synBit, ackBit = 13, 0x02, 0x10
	return append(tcp(),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: flags, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{synBit | ackBit}, Xor: []byte{0}},
		equal([]byte{synBit}))
}

func state(bit uint32) part {
	return part{ct(expr.CtKeySTATE), bits(bit, 0), differs(host32(0))}
}

func invalid() part { return state(expr.CtStateBitINVALID) }
func fresh() part   { return state(expr.CtStateBitNEW) }
func related() part { return state(expr.CtStateBitRELATED) }

// daddrIn is ip daddr @set or ip6 daddr @set, as the set's type says.
func daddrIn(set *nftables.Set) part {
	family, offset, length := byte(unix.NFPROTO_IPV4), uint32(16), uint32(4)
	if set.KeyType.Name == nftables.TypeIP6Addr.Name {
		family, offset, length = unix.NFPROTO_IPV6, 24, 16
	}
	return part{
		meta(expr.MetaKeyNFPROTO), equal([]byte{family}),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: length},
		lookup(set),
	}
}

func family(is6 bool) part {
	if is6 {
		return part{meta(expr.MetaKeyNFPROTO), equal([]byte{unix.NFPROTO_IPV6})}
	}
	return part{meta(expr.MetaKeyNFPROTO), equal([]byte{unix.NFPROTO_IPV4})}
}

// toPort53 is a query to whatever server.
func toPort53() part {
	const dport = 2
	return part{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: dport, Len: 2},
		equal(binaryutil.BigEndian.PutUint16(53)),
	}
}

// onLoopback is a destination on loopback: 127.0.0.0/8, or ::1.
func onLoopback(is6 bool) part {
	if is6 {
		one := make([]byte, 16)
		one[15] = 1
		return append(family(true),
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 24, Len: 16}, equal(one))
	}
	return append(family(false),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 1}, equal([]byte{127}))
}

// dnatPort gives a packet another destination port, and leaves its address.
func dnatPort(port uint16) part {
	return part{
		&expr.Immediate{Register: 1, Data: binaryutil.BigEndian.PutUint16(port)},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_INET, RegProtoMin: 1, Specified: true},
	}
}

// hasSocket is true of what a program sent: the kernel's own sockets have no
// user.
// dnatTo changes address and port.
func dnatTo(to netip.AddrPort) part {
	family := uint32(unix.NFPROTO_IPV4)
	if to.Addr().Is6() {
		family = unix.NFPROTO_IPV6
	}
	return part{
		&expr.Immediate{Register: 1, Data: to.Addr().AsSlice()},
		&expr.Immediate{Register: 2, Data: binaryutil.BigEndian.PutUint16(to.Port())},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: family, RegAddrMin: 1, RegProtoMin: 2, Specified: true},
	}
}

func hasSocket() part { return part{meta(expr.MetaKeySKUID), differs(host32(^uint32(0)))} }

// sourceAsIs is snat to the source that the packet has, so that no later nat
// chain gives it another one.
func sourceAsIs(proto byte) part {
	offset, length := uint32(12), uint32(4)
	if proto == unix.NFPROTO_IPV6 {
		offset, length = 8, 16
	}
	return part{
		meta(expr.MetaKeyNFPROTO), equal([]byte{proto}),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: length},
		&expr.NAT{Type: expr.NATTypeSourceNAT, Family: uint32(proto), RegAddrMin: 1},
	}
}

// tproxyTo hands a packet to a transparent listener. Where that has no address
// of its own, it may be of either family.
func tproxyTo(listener netip.AddrPort) part {
	port := &expr.Immediate{Register: 2, Data: binaryutil.BigEndian.PutUint16(listener.Port())}
	addr := listener.Addr()
	if addr.IsUnspecified() {
		return part{port, &expr.TProxy{RegPort: 2}, accept()}
	}
	proto := byte(unix.NFPROTO_IPV4)
	if addr.Is6() {
		proto = unix.NFPROTO_IPV6
	}
	return part{
		meta(expr.MetaKeyNFPROTO), equal([]byte{proto}),
		&expr.Immediate{Register: 1, Data: addr.AsSlice()}, port,
		&expr.TProxy{Family: proto, RegAddr: 1, RegPort: 2}, accept(),
	}
}

func cgroup(level int) expr.Any {
	return &expr.Socket{Key: expr.SocketKeyCgroupv2, Level: uint32(level), Register: 1}
}

func cgroupIs(c Cgroup) part {
	return part{cgroup(c.Level), equal(binaryutil.NativeEndian.PutUint64(c.ID))}
}

func cgroupIn(level int, set *nftables.Set) part {
	return part{cgroup(level), lookup(set)}
}

func saddrType(e func([]byte) expr.Any, kind uint32) part {
	return part{&expr.Fib{Register: 1, FlagSADDR: true, ResultADDRTYPE: true}, e(host32(kind))}
}

func daddrType(e func([]byte) expr.Any, kind uint32) part {
	return part{&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true}, e(host32(kind))}
}

// daddrGoesNowhere is true where the routes for the packet's mark lead nowhere,
// whatever device its socket is bound to. IPv6 only: of IPv4 fib knows addresses of
// this machine and no routes.
func daddrGoesNowhere() part {
	return part{
		&expr.Fib{Register: 1, FlagDADDR: true, FlagMARK: true, ResultADDRTYPE: true},
		equal(host32(unix.RTN_UNREACHABLE)),
	}
}

// reject is an ICMP error of either family: administratively prohibited.
func reject() part {
	return part{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED}}
}

// reset refuses a TCP connection.
func reset() part {
	return part{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}}
}

func accept() expr.Any       { return &expr.Verdict{Kind: expr.VerdictAccept} }
func jump(chain string) part { return part{&expr.Verdict{Kind: expr.VerdictJump, Chain: chain}} }
func drop() part             { return part{&expr.Verdict{Kind: expr.VerdictDrop}} }
func leave() part            { return part{&expr.Verdict{Kind: expr.VerdictReturn}} }
func goTo(chain string) part { return part{&expr.Verdict{Kind: expr.VerdictGoto, Chain: chain}} }

func count(name string) part {
	return part{&expr.Objref{Type: int(nftables.ObjTypeCounter), Name: name}}
}

func join(parts ...part) []expr.Any {
	var all []expr.Any
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}
