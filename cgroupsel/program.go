package cgroupsel

import (
	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// licence lets the programs call probe_read_kernel_str, which wants one that is
// compatible with the GPL.
const licence = "Dual MIT/GPL"

// pathBytes is how much of a path the trie can compare: an LPM key has 2048
// bits at most.
const pathBytes = 256

// Offsets that are kernel ABI (uapi/linux/bpf.h).
const (
	sockMark     = 16 // struct bpf_sock
	sockAddrSock = 64 // struct bpf_sock_addr: sk
)

// Slots of the counter map.
const (
	countFull    = iota // sel would not take another cgroup
	countPath           // a path or id of a new cgroup could not be read
	countMark           // SO_MARK was refused in connect
	countFrame          // frames dropped, and ways around that refused
	countEntries        // how many there are
)

// value is what sel and the trie hold: the mark, already under the mask. Mask
// 0 means "not selected". The programs ask for no more than that to tell who
// is selected: everything is decided before a process can be in the cgroup.
type value struct {
	Mark, Mask uint32
	Selection  uint32
	Flags      uint32
}

// The flags of a value. All but the first two are inherited by what is made
// below.
const (
	flagTop   = 1 << iota // selected by a path or pattern of its own, not as a child
	flagRival             // a pattern of another selection matches too, and lost
	flagPlain             // selected by a plain path, here or above
)

// Offsets in value, and its size.
const (
	valueMark      = 0
	valueMask      = 4
	valueSelection = 8
	valueFlags     = 12
	valueBytes     = 16
)

// Stack slots of the programs, from the frame pointer.
const (
	slotRead   = -8  // what readKernel fetched
	slotParent = -16 // id of the parent
	slotID     = -24 // id of the cgroup
	slotValue  = -40 // a value
	slotIndex  = -48 // u32 key of an array map
	slotMark   = -56
	slotLength = -64 // of a path
	slotCookie = -72
	slotSender = -104
)

// readKernel loads size bytes of kernel memory at src+off into slotRead, and
// jumps to fail where that is not to be had. It takes R0 to R5.
func readKernel(src asm.Register, off int32, size int32, fail string) asm.Instructions {
	return asm.Instructions{
		asm.Mov.Reg(asm.R1, asm.RFP),
		asm.Add.Imm(asm.R1, slotRead),
		asm.Mov.Imm(asm.R2, size),
		asm.Mov.Reg(asm.R3, src),
		asm.Add.Imm(asm.R3, off),
		asm.FnProbeReadKernel.Call(),
		asm.JNE.Imm(asm.R0, 0, fail),
	}
}

// readPointer is readKernel of eight bytes into a register.
func readPointer(dst, src asm.Register, off int32, fail string) asm.Instructions {
	return append(readKernel(src, off, 8, fail), asm.LoadMem(dst, asm.RFP, slotRead, asm.DWord))
}

// mapCall prepares R1 and R2 with a map and a key on the stack, and calls fn.
func mapCall(fd int, key int32, fn asm.BuiltinFunc) asm.Instructions {
	return asm.Instructions{
		asm.LoadMapPtr(asm.R1, fd),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, key),
		fn.Call(),
	}
}

// count adds one to a counter. Its first instruction carries the label.
func count(m *maps, slot int32, label string) asm.Instructions {
	ins := asm.Instructions{
		asm.Mov.Imm(asm.R1, slot).WithSymbol(label),
		asm.StoreMem(asm.RFP, slotIndex, asm.R1, asm.Word),
	}
	ins = append(ins, mapCall(m.count.FD(), slotIndex, asm.FnMapLookupElem)...)
	return append(ins,
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.Mov.Imm(asm.R1, 1),
		asm.StoreXAdd(asm.R0, asm.R1, asm.DWord),
	)
}

// unifiedOnly leaves the program for cgroups of v1: their ids are small and can
// be those of v2 cgroups. R6 is the cgroup, R7 becomes its id.
func unifiedOnly(l *layout) asm.Instructions {
	var ins asm.Instructions
	ins = append(ins, readPointer(asm.R3, asm.R6, l.cgroupRoot, "lost")...)
	ins = append(ins, readKernel(asm.R3, l.hierarchyID, 4, "lost")...)
	ins = append(ins,
		asm.LoadMem(asm.R1, asm.RFP, slotRead, asm.Word),
		asm.JNE.Imm(asm.R1, 0, "out"),
	)
	return append(ins, readID(l, asm.R7, asm.R6)...)
}

// readID loads the id of the cgroup in src.
func readID(l *layout, dst, src asm.Register) asm.Instructions {
	ins := readPointer(asm.R3, src, l.cgroupKn, "lost")
	return append(ins, readPointer(dst, asm.R3, l.knID, "lost")...)
}

// chooser is a piece of program that jumps to "out" unless the current task is
// selected, and leaves the mark in R7 and the mask in R8.
type chooser asm.Instructions

// bySel asks the map: for programs at the root. It is not for others.
func bySel(m *maps, others []int32) chooser {
	if m.named != nil {
		return orNamed(m, others)
	}
	ins := asm.Instructions{
		asm.FnGetCurrentCgroupId.Call(),
		asm.StoreMem(asm.RFP, slotID, asm.R0, asm.DWord),
	}
	ins = append(ins, mapCall(m.sel.FD(), slotID, asm.FnMapLookupElem)...)
	ins = append(ins,
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.LoadMem(asm.R8, asm.R0, valueMask, asm.Word),
		asm.JEq.Imm(asm.R8, 0, "out"),
		asm.LoadMem(asm.R7, asm.R0, valueMark, asm.Word),
	)
	return chooser(append(ins, notOf(others)...))
}

// notOf leaves the program if the value at R0 is of one of others. R1 is its
// selection then.
func notOf(others []int32) asm.Instructions {
	ins := asm.Instructions{asm.LoadMem(asm.R1, asm.R0, valueSelection, asm.Word)}
	for _, selection := range others {
		ins = append(ins, asm.JEq.Imm(asm.R1, selection, "out"))
	}
	return ins
}

// always is for programs on the selected cgroups themselves: only cgtun's own
// cgroup, if there is one below them, is exempt.
func always(v value, self uint64) chooser {
	ins := chooser{
		asm.LoadImm(asm.R7, int64(v.Mark), asm.DWord),
		asm.LoadImm(asm.R8, int64(v.Mask), asm.DWord),
	}
	if self == 0 {
		return ins
	}
	return append(ins,
		asm.FnGetCurrentCgroupId.Call(),
		asm.LoadImm(asm.R1, int64(self), asm.DWord),
		asm.JEq.Reg(asm.R0, asm.R1, "out"),
	)
}

// merge makes R3, the old mark, the new one: only bits of the mask change.
func merge() asm.Instructions {
	return asm.Instructions{
		asm.Mov.Reg32(asm.R1, asm.R8),
		asm.Xor.Imm32(asm.R1, -1),
		asm.And.Reg32(asm.R3, asm.R1),
		asm.Or.Reg32(asm.R3, asm.R7),
	}
}

// createProgram marks a socket when it is made, before any route lookup.
func createProgram(m *maps, choose chooser) *ebpf.ProgramSpec {
	ins := append(asm.Instructions{asm.Mov.Reg(asm.R6, asm.R1)}, choose...)
	ins = append(ins, remember(m)...)
	ins = append(ins, asm.LoadMem(asm.R3, asm.R6, sockMark, asm.Word))
	ins = append(ins, merge()...)
	ins = append(ins, asm.StoreMem(asm.R6, sockMark, asm.R3, asm.Word))
	return program("cgtun_create", ebpf.CGroupSock, ebpf.AttachCGroupInetSockCreate, append(ins, leave(1)...))
}

// connectProgram marks a socket when it is connected: one that is older than
// its process's move into the cgroup, or whose mark the process took off.
func connectProgram(name string, at ebpf.AttachType, m *maps, choose chooser) *ebpf.ProgramSpec {
	ins := append(asm.Instructions{asm.Mov.Reg(asm.R6, asm.R1)}, choose...)
	ins = append(ins, remember(m)...)
	ins = append(ins,
		asm.LoadMem(asm.R4, asm.R6, sockAddrSock, asm.DWord),
		asm.JEq.Imm(asm.R4, 0, "out"),
		asm.LoadMem(asm.R3, asm.R4, sockMark, asm.Word),
		asm.Mov.Reg32(asm.R9, asm.R3),
	)
	ins = append(ins, merge()...)
	ins = append(ins,
		// Setting SO_MARK drops the socket's cached route: not for nothing.
		asm.JEq.Reg(asm.R3, asm.R9, "out"),
		asm.StoreMem(asm.RFP, slotMark, asm.R3, asm.Word),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Imm(asm.R2, unix.SOL_SOCKET),
		asm.Mov.Imm(asm.R3, unix.SO_MARK),
		asm.Mov.Reg(asm.R4, asm.RFP),
		asm.Add.Imm(asm.R4, slotMark),
		asm.Mov.Imm(asm.R5, 4),
		asm.FnSetsockopt.Call(),
		asm.JEq.Imm(asm.R0, 0, "out"),
	)
	ins = append(ins, count(m, countMark, "refused")...)
	return program(name, ebpf.CGroupSockAddr, at, append(ins, leave(1)...))
}

// leave is the one way out. For the socket programs 1 means "allowed".
func leave(verdict int32) asm.Instructions {
	return asm.Instructions{
		asm.Mov.Imm(asm.R0, verdict).WithSymbol("out"),
		asm.Return(),
	}
}

func program(name string, typ ebpf.ProgramType, at ebpf.AttachType, ins asm.Instructions) *ebpf.ProgramSpec {
	return &ebpf.ProgramSpec{Name: name, Type: typ, AttachType: at, Instructions: ins, License: licence}
}
