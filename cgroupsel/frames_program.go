package cgroupsel

import (
	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// Offsets that are kernel ABI (uapi/linux/bpf.h).
const (
	skbSock      = 168 // struct __sk_buff: sk
	sockFamily   = 4   // struct bpf_sock
	optionLevel  = 24  // struct bpf_sockopt
	optionName   = 28
	optionLength = 32
)

// What a program at tcx says: the next one decides, or nobody.
const (
	tcxNext = -1
	tcxDrop = 2
)

// An Ethernet header, and types in it as they lie in memory.
const (
	etherType  = 12
	etherBytes = 14
	etherIPv4  = 0x0008
	etherARP   = 0x0608
)

const (
	packetQdiscBypass = 20  // PACKET_QDISC_BYPASS of linux/if_packet.h
	solXDP            = 283 // SOL_XDP
	// optionBytes is what a setsockopt program may be shown at most. Kernels
	// before 6.5 fail calls with more, unless the program says that it has not
	// looked: iptables-legacy makes such calls.
	optionBytes = 4096
)

// frameProgram is for the egress of a device. It drops what sockets of packet(7)
// of selected cgroups send, but for ARP and what is bypassed everywhere. It is not
// for others.
func frameProgram(m *maps, kind frameKind, others []int32) *ebpf.ProgramSpec {
	ins := asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMem(asm.R2, asm.R6, skbSock, asm.DWord),
		asm.JEq.Imm(asm.R2, 0, "out"),
		asm.LoadMem(asm.R3, asm.R2, sockFamily, asm.Word),
		asm.JNE.Imm(asm.R3, unix.AF_PACKET, "out"),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.FnSkbCgroupId.Call(),
		asm.StoreMem(asm.RFP, slotID, asm.R0, asm.DWord),
	}
	ins = append(ins, mapCall(m.sel.FD(), slotID, asm.FnMapLookupElem)...)
	stranger := "out"
	if kind.all != AnyCgroup {
		stranger = "ours"
	}
	ins = append(ins,
		asm.JEq.Imm(asm.R0, 0, stranger),
		asm.LoadMem(asm.R1, asm.R0, valueMask, asm.Word),
		asm.JEq.Imm(asm.R1, 0, "out"),
	)
	if kind.all == AnyCgroup {
		ins = append(ins, notOf(others)...)
	}
	ins = append(ins, asm.Mov.Imm(asm.R7, 0).WithSymbol("ours"))
	if !kind.ethernet {
		ins = append(ins, asm.Ja.Label("outward"))
	} else {
		ins = append(ins,
			asm.Mov.Reg(asm.R1, asm.R6),
			asm.Mov.Imm(asm.R2, etherType),
			asm.Mov.Reg(asm.R3, asm.RFP),
			asm.Add.Imm(asm.R3, slotDst),
			asm.Mov.Imm(asm.R4, 2),
			asm.FnSkbLoadBytes.Call(),
			asm.JNE.Imm(asm.R0, 0, "outward"),
			asm.LoadMem(asm.R1, asm.RFP, slotDst, asm.Half),
			asm.JEq.Imm(asm.R1, etherARP, "out"),
			asm.JEq.Imm(asm.R1, ethIPv6, "to v6"),
			asm.JEq.Imm(asm.R1, etherIPv4, "to v4"),
			asm.Ja.Label("outward"),
		)
		ins = append(ins, bypassedAt(etherBytes)...)
	}
	ins = append(ins, count(m, countFrame, "outward")...)
	ins = append(ins,
		asm.Mov.Imm(asm.R0, tcxDrop),
		asm.Return(),
	)
	return program("cgtun_frames", ebpf.SchedCLS, ebpf.AttachTCXEgress, append(ins, leave(tcxNext)...))
}

// optionProgram is for setsockopt. It refuses those whom choose lets through
// what goes around frameProgram.
func optionProgram(m *maps, choose chooser) *ebpf.ProgramSpec {
	ins := asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMem(asm.R1, asm.R6, optionLength, asm.Word),
		asm.JLE.Imm32(asm.R1, optionBytes, "seen"),
		asm.Mov.Imm(asm.R1, 0),
		asm.StoreMem(asm.R6, optionLength, asm.R1, asm.Word),
		asm.LoadMem(asm.R1, asm.R6, optionLevel, asm.Word).WithSymbol("seen"),
		asm.JEq.Imm(asm.R1, solXDP, "choose"),
		asm.JNE.Imm(asm.R1, unix.SOL_PACKET, "out"),
		asm.LoadMem(asm.R1, asm.R6, optionName, asm.Word),
		asm.JNE.Imm(asm.R1, packetQdiscBypass, "out"),
		asm.Mov.Imm(asm.R7, 0).WithSymbol("choose"),
	}
	ins = append(ins, choose...)
	ins = append(ins, count(m, countFrame, "refused")...)
	ins = append(ins,
		asm.Mov.Imm(asm.R0, 0),
		asm.Return(),
	)
	return program("cgtun_options", ebpf.CGroupSockopt, ebpf.AttachCGroupSetsockopt, append(ins, leave(1)...))
}
