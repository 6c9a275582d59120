package cgroupsel

import (
	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// # Theory of operation: first, hold, gate
//
// No packet of a selected process may leave a namespace that is not attached.
// Three things see to it, each the net under the one before; all act on
// selected cgroups alone, and on other namespaces than home and select.netns.
//
//	first  fork, exec, a move into a cgroup, the opening of a socket: if the
//	       task is selected and its namespace unknown, a record says so, and
//	       the namespace is in the next Snapshot (discover.go)
//	hold   a task that reaches exec or its first socket in an unknown namespace
//	       is stopped, until Admit or Deny, or hold.go gives up (hold.go)
//	gate   what a selected cgroup sends from an unknown namespace is dropped
//
// A namespace is known by its cookie, which is never used again. What the gate
// does there is one entry of the map known:
//
//	none         unknown: told of, held, shut
//	knownPass    Admit, home, select.netns: open, and guarded
//	knownShut    Deny, or neither came in time: shut
//	knownWaived  above the bounds: open or shut by on_exit of the selection
//
// and beside knownPass
//
//	knownTell    for offline namespaces: the next exec or socket there is told of, once
//	knownDoubt4, knownDoubt6
//	             Doubt: as without an entry, but what is sent by the other family
//	             passes on, guarded: it is captured, and a gap would be a failure of
//	             who sends meanwhile
//
// With the last sign of life, at the end or by the kernel after a kill, the
// gate opens for selections whose on_exit is "open", known or not.
//
// The gate lets loopback pass everywhere: what is sent there stays inside of
// the namespace, and a step may talk to itself before it is attached. So does
// what is bypassed in every namespace.
//
// The guard is a part of the gate, for open namespaces: a packet that has the
// mark of its selection may leave by that selection's tun and by nothing else.
// SO_BINDTODEVICE needs no capability, and the routes of a tun go with it.
// In home the steering's table does the same; there the guard is only for what
// outlives us.
//
// The gate sees the cgroup of the *socket*, and mark and interface as they are
// after all routing. RSTs, ICMP errors and echo replies come from sockets of
// the kernel, in no cgroup, and pass.

// Offsets in struct __sk_buff (uapi/linux/bpf.h).
const (
	skbMark    = 8
	skbIfindex = 40
)

// loopback is the index of lo: it is the first device of every namespace.
const loopback = 1

// More stack slots.
const slotGuardKey = -112 // a guardKey

// gateProgram is for cgroup_skb/egress at the root of cgroup2. It is not for
// others.
func (p *spaceProgram) gateProgram(others []int32) *ebpf.ProgramSpec {
	ins := asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.FnSkbCgroupId.Call(),
		asm.StoreMem(asm.RFP, slotID, asm.R0, asm.DWord),
	}
	ins = append(ins, mapCall(p.sel.sel.FD(), slotID, asm.FnMapLookupElem)...)
	ins = append(ins,
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.LoadMem(asm.R8, asm.R0, valueMask, asm.Word),
		asm.JEq.Imm(asm.R8, 0, "out"),
		asm.LoadMem(asm.R7, asm.R0, valueMark, asm.Word),
	)
	ins = append(ins, notOf(others)...)
	ins = append(ins, p.shutFlags()...)
	ins = append(ins,
		asm.LoadMem(asm.R9, asm.R6, skbIfindex, asm.Word),
		asm.JEq.Imm(asm.R9, loopback, "out"),
	)
	ins = append(ins, p.cookie()...)
	ins = append(ins,
		asm.StoreMem(asm.RFP, slotSpace, asm.R0, asm.DWord),
		asm.StoreMem(asm.RFP, slotGuardKey, asm.R0, asm.DWord),
	)
	ins = append(ins, mapCall(p.m.known.FD(), slotSpace, asm.FnMapLookupElem)...)
	ins = append(ins,
		asm.JEq.Imm(asm.R0, 0, "shut"),
		asm.LoadMem(asm.R1, asm.R0, 0, asm.Word),
		asm.LoadMem(asm.R2, asm.RFP, slotRead, asm.Word),
		asm.LoadMem(asm.R3, asm.R6, skbProtocol, asm.Word),
		asm.JNE.Imm(asm.R3, ethIPv6, "doubts of v4"),
		asm.Or.Imm(asm.R2, knownDoubt6),
		asm.Ja.Label("doubts"),
		asm.Or.Imm(asm.R2, knownDoubt4).WithSymbol("doubts of v4"),
		asm.And.Reg(asm.R1, asm.R2).WithSymbol("doubts"),
		asm.JNE.Imm(asm.R1, 0, "shut"),
	)
	ins = append(ins, p.guard()...)
	ins = append(ins, drop(p.m, countGuard, "guarded")...)
	ins = append(ins, bypassed()...)
	ins = append(ins, p.unwatched("outward", "dropped")...)
	ins = append(ins, drop(p.m, countDrop, "dropped")...)
	return program("cgtun_gate", ebpf.CGroupSKB, ebpf.AttachCGroupInetEgress, append(ins, leave(1)...))
}

// shutFlags writes to slotRead those flags of known with which the gate is shut
// for the selection in R1.
func (p *spaceProgram) shutFlags() asm.Instructions {
	ins := asm.Instructions{asm.Mov.Imm(asm.R2, knownShut|knownWaived)}
	for _, selection := range p.closed {
		ins = append(ins, asm.JEq.Imm(asm.R1, selection, "closed"))
	}
	return append(ins,
		asm.Mov.Imm(asm.R2, knownShut),
		asm.StoreMem(asm.RFP, slotRead, asm.R2, asm.Word).WithSymbol("closed"),
	)
}

// guard goes on only with a packet to be dropped: one with the mark R7 under
// the mask R8, that leaves by another interface (R9) than its tun.
func (p *spaceProgram) guard() asm.Instructions {
	ins := asm.Instructions{
		asm.LoadMem(asm.R1, asm.R6, skbMark, asm.Word),
		asm.And.Reg32(asm.R1, asm.R8),
		asm.JNE.Reg32(asm.R1, asm.R7, "out"),
		asm.StoreMem(asm.RFP, slotGuardKey+8, asm.R7, asm.Word),
		asm.Mov.Imm(asm.R1, 0),
		asm.StoreMem(asm.RFP, slotGuardKey+12, asm.R1, asm.Word),
	}
	ins = append(ins, mapCall(p.m.guard.FD(), slotGuardKey, asm.FnMapLookupElem)...)
	return append(ins,
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.LoadMem(asm.R1, asm.R0, 0, asm.Word),
		asm.JEq.Reg32(asm.R1, asm.R9, "out"),
	)
}

// unwatched lets what an open selection sends pass once the last sign of life
// was taken away: who is held goes on then, and that is before the kernel has
// detached the gate. Else it goes on at its other label.
func (p *spaceProgram) unwatched(label, shut string) asm.Instructions {
	ins := asm.Instructions{
		asm.LoadMem(asm.R1, asm.RFP, slotRead, asm.Word).WithSymbol(label),
		asm.JNE.Imm(asm.R1, knownShut, shut),
		asm.Mov.Imm(asm.R1, 0),
		asm.StoreMem(asm.RFP, slotIndex, asm.R1, asm.Word),
	}
	ins = append(ins, mapCall(p.m.beat.FD(), slotIndex, asm.FnMapLookupElem)...)
	return append(ins,
		asm.JEq.Imm(asm.R0, 0, shut),
		asm.LoadMem(asm.R1, asm.R0, 0, asm.DWord),
		asm.JEq.Imm(asm.R1, 0, "out"),
	)
}

// drop counts and leaves the program with "not allowed".
func drop(m *spaceMaps, slot int32, label string) asm.Instructions {
	ins := asm.Instructions{
		asm.Mov.Imm(asm.R1, slot).WithSymbol(label),
		asm.StoreMem(asm.RFP, slotIndex, asm.R1, asm.Word),
	}
	ins = append(ins, mapCall(m.count.FD(), slotIndex, asm.FnMapLookupElem)...)
	counted := label + " and counted"
	return append(ins,
		asm.JEq.Imm(asm.R0, 0, counted),
		asm.Mov.Imm(asm.R1, 1),
		asm.StoreXAdd(asm.R0, asm.R1, asm.DWord),
		asm.Mov.Imm(asm.R0, 0).WithSymbol(counted),
		asm.Return(),
	)
}
