package cgroupsel

import (
	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// More stack slots, below those of program.go.
const (
	slotSpace = -72 // cookie of a network namespace
	slotPids  = -80 // u32 tgid, u32 tid
	slotStop  = -96 // a stopped
	slotSpare = -104
)

// alive is for how long after its last sign of life the reader is believed to
// be there: without it nobody is held, as nobody would let him go.
const alive = 1500 * 1000 * 1000 // ns

// taskLayout says where this kernel keeps what is asked of a task.
type taskLayout struct {
	nsproxy, cgroups, tgid, pid, comm, signal int32 // struct task_struct
	realParent, children, pidLinks, flags     int32 // struct task_struct
	netNS                                     int32 // struct nsproxy
	cookie                                    int32 // struct net
	cgroup                                    int32 // struct css_set: that of v2
	live, pids                                int32 // struct signal_struct
	tasks                                     int32 // struct pid
	seq                                       int32 // struct bpf_iter_meta
}

func (s *Selector) readTaskLayout() (*taskLayout, error) {
	var t taskLayout
	err := s.readOffsets([]member{
		{"task_struct", "nsproxy", &t.nsproxy},
		{"task_struct", "cgroups", &t.cgroups},
		{"task_struct", "tgid", &t.tgid},
		{"task_struct", "pid", &t.pid},
		{"task_struct", "comm", &t.comm},
		{"task_struct", "signal", &t.signal},
		{"task_struct", "real_parent", &t.realParent},
		{"task_struct", "children", &t.children},
		{"task_struct", "pid_links", &t.pidLinks},
		{"task_struct", "flags", &t.flags},
		{"nsproxy", "net_ns", &t.netNS},
		{"net", "net_cookie", &t.cookie},
		{"css_set", "dfl_cgrp", &t.cgroup},
		{"signal_struct", "live", &t.live},
		{"signal_struct", "pids", &t.pids},
		{"pid", "tasks", &t.tasks},
		{"bpf_iter_meta", "seq", &t.seq},
	})
	return &t, err
}

// record is what the programs tell of a task, in the ring and by the iterator.
type record struct {
	Cookie uint64 // its network namespace
	Cgroup uint64
	PID    uint32
	TID    uint32
	Held   uint32   // where it was stopped: heldInExec, heldAtSocket; 0: it was not
	Again  uint32   // 1: the namespace is known, and this was to be told
	Comm   [16]byte // not filled in by the iterator
}

// Where a task is stopped.
const (
	heldInExec   = 1
	heldAtSocket = 2
)

// Offsets in record, and its size.
const (
	recordCookie = 0
	recordCgroup = 8
	recordPids   = 16
	recordHeld   = 24
	recordAgain  = 28
	recordComm   = 32
	recordBytes  = 48
)

// Why a record is written: R8 of the programs.
const (
	tellOnly  = 0
	tellHold  = 1
	tellAgain = 2 // its second bit becomes record.Again
)

// spaceProgram is what the programs of discovery, hold and gate are made from.
type spaceProgram struct {
	sel    *maps
	m      *spaceMaps
	l      *layout
	t      *taskLayout
	own    uint32  // our tgid, which is never told of
	closed []int32 // selections with Closed
	spares bool    // who is held does not die of its parent's end: see spareOrphans
}

// selected leaves the program unless the task in R6 is selected and is not
// cgtun. Its cgroup's id is in slotID afterwards, its pids in slotPids. This
// comes first: for all others it is all that is done.
func (p *spaceProgram) selected() asm.Instructions {
	var ins asm.Instructions
	ins = append(ins, readPointer(asm.R3, asm.R6, p.t.cgroups, "out")...)
	ins = append(ins, readPointer(asm.R3, asm.R3, p.t.cgroup, "out")...)
	ins = append(ins, readPointer(asm.R3, asm.R3, p.l.cgroupKn, "out")...)
	ins = append(ins, readPointer(asm.R7, asm.R3, p.l.knID, "out")...)
	ins = append(ins, asm.StoreMem(asm.RFP, slotID, asm.R7, asm.DWord))
	ins = append(ins, mapCall(p.sel.sel.FD(), slotID, asm.FnMapLookupElem)...)
	ins = append(ins,
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.LoadMem(asm.R1, asm.R0, valueMask, asm.Word),
		asm.JEq.Imm(asm.R1, 0, "out"),
	)
	for i, off := range []int32{p.t.tgid, p.t.pid} {
		ins = append(ins, readKernel(asm.R6, off, 4, "out")...)
		ins = append(ins,
			asm.LoadMem(asm.R1, asm.RFP, slotRead, asm.Word),
			asm.StoreMem(asm.RFP, slotPids+4*int16(i), asm.R1, asm.Word),
		)
	}
	return append(ins,
		asm.LoadMem(asm.R1, asm.RFP, slotPids, asm.Word),
		asm.JEq.Imm32(asm.R1, int32(p.own), "out"),
	)
}

// namespace puts the cookie of the task's network namespace into slotSpace
// and looks it up: R0 is the entry of known, or 0. A task that ends has no
// namespace.
func (p *spaceProgram) namespace() asm.Instructions {
	ins := readPointer(asm.R3, asm.R6, p.t.nsproxy, "out")
	ins = append(ins, asm.JEq.Imm(asm.R3, 0, "out"))
	ins = append(ins, readPointer(asm.R3, asm.R3, p.t.netNS, "out")...)
	ins = append(ins, readPointer(asm.R7, asm.R3, p.t.cookie, "out")...)
	ins = append(ins, asm.StoreMem(asm.RFP, slotSpace, asm.R7, asm.DWord))
	return append(ins, mapCall(p.m.known.FD(), slotSpace, asm.FnMapLookupElem)...)
}

// what says what a program does beside telling of unknown namespaces.
type what uint8

const (
	whatAgain what = 1 << iota // it tells of known ones that are to be told of, too
	whatHold                   // it stops the task, which is the current one, in unknown ones
	whatOpens                  // the task opens a socket
)

// tell writes a record of the selected task in R6 if its namespace is unknown,
// or as w says.
func (p *spaceProgram) tell(w what) asm.Instructions {
	ins := append(p.selected(), p.namespace()...)
	ins = append(ins,
		asm.Mov.Imm(asm.R8, tellOnly),
		asm.JEq.Imm(asm.R0, 0, "unknown"),
		asm.LoadMem(asm.R1, asm.R0, 0, asm.Word),
		asm.And.Imm(asm.R1, knownDoubts),
		asm.JNE.Imm(asm.R1, 0, "unknown"),
	)
	if w&whatAgain != 0 {
		ins = append(ins,
			asm.LoadMem(asm.R1, asm.R0, 0, asm.Word),
			asm.Mov.Reg(asm.R2, asm.R1),
			asm.And.Imm(asm.R2, knownTell),
			asm.JEq.Imm(asm.R2, 0, "out"),
			asm.And.Imm(asm.R1, ^knownTell),
			asm.StoreMem(asm.R0, 0, asm.R1, asm.Word),
			asm.Mov.Imm(asm.R8, tellAgain),
			asm.Ja.Label("record"),
		)
	} else {
		ins = append(ins, asm.Ja.Label("out"))
	}
	if w&whatHold != 0 {
		ins = append(ins, p.readerLives("unknown", "record")...)
	} else {
		ins = append(ins, asm.Mov.Imm(asm.R8, tellOnly).WithSymbol("unknown"))
	}
	ins = append(ins,
		asm.LoadMapPtr(asm.R1, p.m.seen.FD()).WithSymbol("record"),
		asm.Mov.Imm(asm.R2, recordBytes),
		asm.Mov.Imm(asm.R3, 0),
		asm.FnRingbufReserve.Call(),
		asm.JEq.Imm(asm.R0, 0, "full"),
		asm.Mov.Reg(asm.R9, asm.R0),
	)
	ins = append(ins, p.fill()...)
	if w&whatHold != 0 {
		ins = append(ins, p.stop(w, "submit")...)
	}
	ins = append(ins,
		asm.Mov.Reg(asm.R1, asm.R9).WithSymbol("submit"),
		asm.Mov.Imm(asm.R2, 0),
		asm.FnRingbufSubmit.Call(),
		asm.Ja.Label("out"),
	)
	return append(ins, count(&maps{count: p.m.count}, countLost, "full")...)
}

// fill writes the record in R9.
func (p *spaceProgram) fill() asm.Instructions {
	return asm.Instructions{
		asm.LoadMem(asm.R1, asm.RFP, slotSpace, asm.DWord),
		asm.StoreMem(asm.R9, recordCookie, asm.R1, asm.DWord),
		asm.LoadMem(asm.R1, asm.RFP, slotID, asm.DWord),
		asm.StoreMem(asm.R9, recordCgroup, asm.R1, asm.DWord),
		asm.LoadMem(asm.R1, asm.RFP, slotPids, asm.DWord),
		asm.StoreMem(asm.R9, recordPids, asm.R1, asm.DWord),
		asm.Mov.Imm(asm.R1, 0),
		asm.StoreMem(asm.R9, recordHeld, asm.R1, asm.Word),
		asm.Mov.Reg(asm.R1, asm.R8),
		asm.RSh.Imm(asm.R1, 1),
		asm.StoreMem(asm.R9, recordAgain, asm.R1, asm.Word),
		asm.Mov.Reg(asm.R1, asm.R9),
		asm.Add.Imm(asm.R1, recordComm),
		asm.Mov.Imm(asm.R2, 16),
		asm.Mov.Reg(asm.R3, asm.R6),
		asm.Add.Imm(asm.R3, p.t.comm),
		asm.FnProbeReadKernel.Call(),
	}
}

// taskProgram is for a tracepoint about a task; arg is its place among the
// arguments. A child that is told of at the fork has not run yet.
func (p *spaceProgram) taskProgram(name string, arg int16, w what) *ebpf.ProgramSpec {
	ins := asm.Instructions{asm.LoadMem(asm.R6, asm.R1, 8*arg, asm.DWord)}
	ins = append(ins, p.tell(w)...)
	return program(name, ebpf.RawTracepoint, ebpf.AttachNone, append(ins, leave(0)...))
}

// socketProgram tells of the task that opens an internet socket: one that
// unshared or entered a namespace without fork and exec is seen here first.
func (p *spaceProgram) socketProgram(w what) *ebpf.ProgramSpec {
	ins := asm.Instructions{
		asm.FnGetCurrentTask.Call(),
		asm.Mov.Reg(asm.R6, asm.R0),
	}
	ins = append(ins, p.tell(w|whatOpens)...)
	return program("cgtun_opens", ebpf.CGroupSock, ebpf.AttachCGroupInetSockCreate, append(ins, leave(1)...))
}

// allProgram is an iterator over all tasks (bpf_iter): it writes a record of
// each selected one, in whatever namespace.
func (p *spaceProgram) allProgram() *ebpf.ProgramSpec {
	ins := asm.Instructions{
		asm.LoadMem(asm.R6, asm.R1, 8, asm.DWord), // struct task_struct *
		asm.JEq.Imm(asm.R6, 0, "out"),
		asm.LoadMem(asm.R9, asm.R1, 0, asm.DWord), // struct bpf_iter_meta *
	}
	ins = append(ins, p.selected()...)
	ins = append(ins, p.namespace()...)
	const row = -160
	ins = append(ins,
		asm.LoadMem(asm.R1, asm.RFP, slotSpace, asm.DWord),
		asm.StoreMem(asm.RFP, row+recordCookie, asm.R1, asm.DWord),
		asm.LoadMem(asm.R1, asm.RFP, slotID, asm.DWord),
		asm.StoreMem(asm.RFP, row+recordCgroup, asm.R1, asm.DWord),
		asm.LoadMem(asm.R1, asm.RFP, slotPids, asm.DWord),
		asm.StoreMem(asm.RFP, row+recordPids, asm.R1, asm.DWord),
		asm.Mov.Imm(asm.R1, 0),
		asm.StoreMem(asm.RFP, row+recordHeld, asm.R1, asm.DWord),
		asm.StoreMem(asm.RFP, row+recordComm, asm.R1, asm.DWord),
		asm.StoreMem(asm.RFP, row+recordComm+8, asm.R1, asm.DWord),
		asm.LoadMem(asm.R1, asm.R9, int16(p.t.seq), asm.DWord),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, row),
		asm.Mov.Imm(asm.R3, recordBytes),
		asm.FnSeqWrite.Call(),
	)
	spec := program("cgtun_tasks", ebpf.Tracing, ebpf.AttachTraceIter, append(ins, leave(0)...))
	spec.AttachTo = "task"
	return spec
}

// readerLives goes on at its label if the reader gave a sign of life lately,
// and says in R8 that the task is to be held; else it jumps to none.
func (p *spaceProgram) readerLives(label, none string) asm.Instructions {
	ins := asm.Instructions{
		asm.Mov.Imm(asm.R1, 0).WithSymbol(label),
		asm.StoreMem(asm.RFP, slotIndex, asm.R1, asm.Word),
	}
	ins = append(ins, mapCall(p.m.beat.FD(), slotIndex, asm.FnMapLookupElem)...)
	return append(ins,
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.LoadMem(asm.R7, asm.R0, 0, asm.DWord),
		asm.JEq.Imm(asm.R7, 0, none),
		asm.FnKtimeGetNs.Call(),
		asm.StoreMem(asm.RFP, slotStop+8, asm.R0, asm.DWord),
		asm.Sub.Reg(asm.R0, asm.R7),
		// Signed: a sign of life can be newer than "now".
		asm.JSGT.Imm(asm.R0, alive, none),
		asm.Mov.Imm(asm.R8, tellHold),
	)
}

// dropOldest is BPF_EXIST, which makes room in a full queue: its oldest entry
// is older than Patience.
const dropOldest = 2

// stop stops the current task if R8 says so. The entry in held comes first: who
// is stopped can always be found there. Where exits do not spare orphans, jobs are
// not stopped: they would die if who forked them ended meanwhile.
func (p *spaceProgram) stop(w what, done string) asm.Instructions {
	held := int32(heldInExec)
	if w&whatOpens != 0 {
		held = heldAtSocket
	}
	ins := asm.Instructions{asm.JNE.Imm(asm.R8, tellHold, done)}
	if !p.spares {
		ins = append(ins, p.isJob(done)...)
	}
	ins = append(ins,
		asm.LoadMem(asm.R1, asm.RFP, slotSpace, asm.DWord),
		asm.StoreMem(asm.RFP, slotStop, asm.R1, asm.DWord),
		asm.Mov.Reg(asm.R3, asm.RFP),
		asm.Add.Imm(asm.R3, slotStop),
		asm.Mov.Imm(asm.R4, 0),
	)
	ins = append(ins, mapCall(p.m.held.FD(), slotPids, asm.FnMapUpdateElem)...)
	ins = append(ins, asm.JNE.Imm(asm.R0, 0, done))
	ins = append(ins, asm.Mov.Imm(asm.R3, dropOldest))
	ins = append(ins, mapCall(p.m.order.FD(), slotPids, asm.FnMapPushElem)...)
	ins = append(ins,
		asm.Mov.Imm(asm.R1, int32(unix.SIGSTOP)),
		asm.FnSendSignal.Call(),
		asm.JNE.Imm(asm.R0, 0, "undo"),
	)
	if p.spares {
		ins = append(ins, p.endsAround("goOn")...)
	}
	// Who lets it go takes the entry out first: if that is still there now, the
	// signal to go on comes after this one to stop.
	ins = append(ins, mapCall(p.m.held.FD(), slotPids, asm.FnMapLookupElem)...)
	ins = append(ins, asm.JEq.Imm(asm.R0, 0, "goOn"))
	// Whoever ends the hold takes the sign of life away and continues all after
	// that: if it is still there now, this task is among them.
	ins = append(ins, mapCall(p.m.beat.FD(), slotIndex, asm.FnMapLookupElem)...)
	ins = append(ins,
		asm.JEq.Imm(asm.R0, 0, "goOn"),
		asm.LoadMem(asm.R1, asm.R0, 0, asm.DWord),
		asm.JNE.Imm(asm.R1, 0, "stopped"),
		asm.Mov.Imm(asm.R1, int32(unix.SIGCONT)).WithSymbol("goOn"),
		asm.FnSendSignal.Call(),
	)
	undo := mapCall(p.m.held.FD(), slotPids, asm.FnMapDeleteElem)
	undo[0] = undo[0].WithSymbol("undo")
	ins = append(ins, undo...)
	ins = append(ins,
		asm.Ja.Label(done),
		asm.Mov.Imm(asm.R1, held).WithSymbol("stopped"),
		asm.StoreMem(asm.R9, recordHeld, asm.R1, asm.Word),
		asm.Mov.Imm(asm.R1, countStop),
		asm.StoreMem(asm.RFP, slotIndex, asm.R1, asm.Word),
	)
	ins = append(ins, mapCall(p.m.count.FD(), slotIndex, asm.FnMapLookupElem)...)
	return append(ins,
		asm.JEq.Imm(asm.R0, 0, done),
		asm.Mov.Imm(asm.R1, 1),
		asm.StoreXAdd(asm.R0, asm.R1, asm.DWord),
	)
}
