package cgroupsel

import "github.com/cilium/ebpf/asm"

// Offsets in struct __sk_buff, and in the headers that its data begin with.
const (
	skbProtocol = 16
	ip4Dst      = 16
	ip6Dst      = 24
)

// slotDst is where the first four bytes of a destination are read to.
const slotDst = -120

// ethIPv6 is ETH_P_IPV6 as it lies in memory.
const ethIPv6 = 0xdd86

// bypassed leaves the program for destinations that are bypassed in every
// namespace: multicast, broadcast and link-local. The kernel's own sockets of a
// namespace that a selected task has made are in its cgroup, and send
// nothing else (RFC 4861, RFC 3810). Its first instruction is "shut"; the skb
// is in R6.
func bypassed() asm.Instructions {
	return append(asm.Instructions{
		asm.LoadMem(asm.R1, asm.R6, skbProtocol, asm.Word).WithSymbol("shut"),
		asm.JNE.Imm(asm.R1, ethIPv6, "to v4"),
	}, bypassedAt(0)...)
}

// bypassedAt is bypassed for a packet that begins at an offset of the skb: at "to
// v6" for one of IPv6, at "to v4" for one of IPv4. With one that is not bypassed
// it goes on behind its end or at "outward".
func bypassedAt(begin int32) asm.Instructions {
	load := func(label string, offset int32) asm.Instructions {
		return asm.Instructions{
			asm.Mov.Reg(asm.R1, asm.R6).WithSymbol(label),
			asm.Mov.Imm(asm.R2, offset),
			asm.Mov.Reg(asm.R3, asm.RFP),
			asm.Add.Imm(asm.R3, slotDst),
			asm.Mov.Imm(asm.R4, 4),
			asm.FnSkbLoadBytes.Call(),
			asm.JNE.Imm(asm.R0, 0, "outward"),
			asm.LoadMem(asm.R1, asm.RFP, slotDst, asm.Byte),
			asm.LoadMem(asm.R2, asm.RFP, slotDst+1, asm.Byte),
		}
	}
	ins := load("to v6", begin+ip6Dst)
	ins = append(ins,
		asm.JEq.Imm(asm.R1, 0xff, "out"),
		asm.JNE.Imm(asm.R1, 0xfe, "outward"),
		asm.And.Imm(asm.R2, 0xc0),
		asm.JEq.Imm(asm.R2, 0x80, "out"),
		asm.Ja.Label("outward"),
	)
	ins = append(ins, load("to v4", begin+ip4Dst)...)
	return append(ins,
		asm.LoadMem(asm.R3, asm.RFP, slotDst, asm.Word),
		asm.JEq.Imm32(asm.R3, -1, "out"),
		asm.Mov.Reg(asm.R3, asm.R1),
		asm.And.Imm(asm.R3, 0xf0),
		asm.JEq.Imm(asm.R3, 0xe0, "out"),
		asm.JNE.Imm(asm.R1, 169, "outward"),
		asm.JEq.Imm(asm.R2, 254, "out"),
	)
}
