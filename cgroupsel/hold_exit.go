package cgroupsel

import (
	"fmt"
	"io"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

const exitTracepoint = "sched_process_exit"

// kfuncs are functions of the kernel that the exit program calls, by the id of
// their type. bpf_send_signal_task is the youngest (6.13).
type kfuncs struct{ taskFromPID, sendSignal, taskRelease btf.TypeID }

func (s *Selector) readKfuncs() (*kfuncs, error) {
	spec, err := s.types()
	if err != nil {
		return nil, fmt.Errorf("read kernel types: %w", err)
	}
	var k kfuncs
	for name, to := range map[string]*btf.TypeID{
		"bpf_task_from_pid":    &k.taskFromPID,
		"bpf_send_signal_task": &k.sendSignal,
		"bpf_task_release":     &k.taskRelease,
	} {
		var f *btf.Func
		if err := spec.TypeByName(name, &f); err != nil {
			return nil, fmt.Errorf("find function %s: %w", name, err)
		}
		if *to, err = spec.TypeID(f); err != nil {
			return nil, fmt.Errorf("find function %s: %w", name, err)
		}
	}
	return &k, nil
}

// callKernel calls one of kfuncs.
func callKernel(id btf.TypeID) asm.Instruction {
	return asm.Instruction{
		OpCode:   asm.OpCode(asm.JumpClass).SetJumpOp(asm.Call),
		Src:      asm.PseudoKfuncCall,
		Constant: int64(id),
	}
}

// attachExit attaches the program for the end of a process, the best that this
// kernel takes.
func (d *spaces) attachExit() error {
	k, err := d.s.readKfuncs()
	if err == nil {
		err = d.s.allowed(featureLetGo)
	}
	if err == nil {
		var lk io.Closer
		if lk, err = attach(d.program.exitProgram(k), func(p *ebpf.Program) (io.Closer, error) {
			return link.AttachTracing(link.TracingOptions{Program: p})
		}); err == nil {
			d.hooks = append(d.hooks, lk)
			d.program.spares = true
			return nil
		}
	}
	d.s.log.Debug("who is held when cgtun is killed waits for its next start, and jobs are not held", "err", err)
	lk, err := attach(d.program.exitProgram(nil), func(p *ebpf.Program) (io.Closer, error) {
		return link.AttachRawTracepoint(link.RawTracepointOptions{Name: exitTracepoint, Program: p})
	})
	if err != nil {
		return fmt.Errorf("tracepoint %s: %w", exitTracepoint, err)
	}
	d.hooks = append(d.hooks, lk)
	return nil
}

// exitProgram takes a process that ends out of held, and continues who would not
// outlive it (spareOrphans). If it is cgtun itself, whatever killed it, all that
// are held go on: its programs and maps are let go only after this tracepoint.
func (p *spaceProgram) exitProgram(k *kfuncs) *ebpf.ProgramSpec {
	ins := asm.Instructions{
		asm.LoadMem(asm.R6, asm.R1, 0, asm.DWord), // struct task_struct *
		asm.FnGetCurrentPidTgid.Call(),
		asm.RSh.Imm(asm.R0, 32),
		asm.StoreMem(asm.RFP, slotPids, asm.R0, asm.Word),
		asm.JEq.Imm32(asm.R0, int32(p.own), "dead"),
	}
	if k != nil {
		ins = append(ins, p.spareOrphans(k)...)
		ins = append(ins,
			asm.FnGetCurrentPidTgid.Call(),
			asm.RSh.Imm(asm.R0, 32),
			asm.StoreMem(asm.RFP, slotPids, asm.R0, asm.Word),
		)
	}
	ins = append(ins, mapCall(p.m.held.FD(), slotPids, asm.FnMapLookupElem)...)
	ins = append(ins, asm.JEq.Imm(asm.R0, 0, "out"))
	// Threads of the process may live on.
	dead := readPointer(asm.R3, asm.R6, p.t.signal, "out")
	dead[0] = dead[0].WithSymbol("dead")
	ins = append(ins, dead...)
	ins = append(ins, readKernel(asm.R3, p.t.live, 4, "out")...)
	ins = append(ins,
		asm.LoadMem(asm.R1, asm.RFP, slotRead, asm.Word),
		asm.JNE.Imm32(asm.R1, 0, "out"),
		asm.LoadMem(asm.R1, asm.RFP, slotPids, asm.Word),
	)
	if k != nil {
		ins = append(ins, asm.JEq.Imm32(asm.R1, int32(p.own), "own"))
	}
	ins = append(ins, mapCall(p.m.held.FD(), slotPids, asm.FnMapDeleteElem)...)
	ins = append(ins, asm.Ja.Label("out"))
	if k != nil {
		ins = append(ins, p.letAllGo(k)...)
	}
	ins = append(ins, leave(0)...)
	if k == nil {
		return program("cgtun_exit", ebpf.RawTracepoint, ebpf.AttachNone, ins)
	}
	// Functions of the kernel can be called from this type alone.
	spec := program("cgtun_exit", ebpf.Tracing, ebpf.AttachTraceRawTp, ins)
	spec.AttachTo = exitTracepoint
	return spec
}

// letAllGo continues all that are in held, through the queue of them: the
// program cannot walk a map.
func (p *spaceProgram) letAllGo(k *kfuncs) asm.Instructions {
	ins := asm.Instructions{
		asm.Mov.Imm(asm.R1, 0).WithSymbol("own"),
		asm.StoreMem(asm.RFP, slotIndex, asm.R1, asm.Word),
	}
	// First nobody may be held any more: see stop.
	ins = append(ins, mapCall(p.m.beat.FD(), slotIndex, asm.FnMapLookupElem)...)
	ins = append(ins,
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.Mov.Imm(asm.R1, 0),
		asm.StoreMem(asm.R0, 0, asm.R1, asm.DWord),
		asm.Mov.Imm(asm.R8, maxHeld),
	)
	next := mapCall(p.m.order.FD(), slotPids, asm.FnMapPopElem)
	next[0] = next[0].WithSymbol("next")
	ins = append(ins, next...)
	ins = append(ins, asm.JNE.Imm(asm.R0, 0, "out"))
	ins = append(ins, mapCall(p.m.held.FD(), slotPids, asm.FnMapLookupElem)...)
	ins = append(ins, asm.JEq.Imm(asm.R0, 0, "another"))
	ins = append(ins, k.goOn(asm.R7, "another")...)
	return append(ins,
		asm.Sub.Imm(asm.R8, 1).WithSymbol("another"),
		asm.JNE.Imm(asm.R8, 0, "next"),
	)
}

// goOn continues the process in slotPids. It uses r, and goes to gone if there is
// no such process any more.
func (k *kfuncs) goOn(r asm.Register, gone string) asm.Instructions {
	return asm.Instructions{
		asm.LoadMem(asm.R1, asm.RFP, slotPids, asm.Word),
		callKernel(k.taskFromPID),
		asm.JEq.Imm(asm.R0, 0, gone),
		asm.Mov.Reg(r, asm.R0),
		asm.Mov.Reg(asm.R1, r),
		asm.Mov.Imm(asm.R2, int32(unix.SIGCONT)),
		asm.Mov.Imm(asm.R3, wholeProcess),
		asm.Mov.Imm(asm.R4, 0),
		callKernel(k.sendSignal),
		asm.Mov.Reg(asm.R1, r),
		callKernel(k.taskRelease),
	}
}

// maxOrphans is how many descendants of a process that ends are looked at.
const maxOrphans = 256

// spareOrphans continues those held among the descendants of the task in R6, which
// ends, that are of its session. A process group that loses its last member with a
// parent elsewhere in the session is sent SIGHUP if one of it is stopped (setpgid(2),
// POSIX.1-2024 _exit): a daemon whose parent ends as soon as it has forked it would
// die of its hold. This tracepoint comes before the kernel looks for such groups.
//
// R7 is where it is in the tree, by depth; R8 counts; R9 is the session.
func (p *spaceProgram) spareOrphans(k *kfuncs) asm.Instructions {
	var ins asm.Instructions
	for _, step := range []asm.Instructions{
		readPointer(asm.R3, asm.R6, p.t.signal, "spared"),
		readPointer(asm.R9, asm.R3, p.t.pids+sessionPID, "spared"),
		{
			asm.Mov.Reg(asm.R7, asm.R6),
			asm.Mov.Imm(asm.R8, maxOrphans),
		},
		labelled("down", readPointer(asm.R3, asm.R7, p.t.children, "spared")),
		{
			asm.Mov.Reg(asm.R1, asm.R7),
			asm.Add.Imm(asm.R1, p.t.children),
			asm.JNE.Reg(asm.R1, asm.R3, "child"),
			asm.JEq.Reg(asm.R7, asm.R6, "spared").WithSymbol("beside"),
		},
		readPointer(asm.R3, asm.R7, p.t.sibling, "spared"),
		{asm.StoreMem(asm.RFP, slotStop, asm.R3, asm.DWord)},
		readPointer(asm.R7, asm.R7, p.t.realParent, "spared"),
		{
			asm.LoadMem(asm.R3, asm.RFP, slotStop, asm.DWord),
			asm.Mov.Reg(asm.R1, asm.R7),
			asm.Add.Imm(asm.R1, p.t.children),
			asm.JNE.Reg(asm.R1, asm.R3, "child"),
			asm.Sub.Imm(asm.R8, 1),
			asm.JNE.Imm(asm.R8, 0, "beside"),
			asm.Ja.Label("spared"),
			asm.Mov.Reg(asm.R7, asm.R3).WithSymbol("child"),
			asm.Sub.Imm(asm.R7, p.t.sibling),
		},
		readPointer(asm.R3, asm.R7, p.t.signal, "spared"),
		readPointer(asm.R3, asm.R3, p.t.pids+sessionPID, "spared"),
		{asm.JNE.Reg(asm.R3, asm.R9, "onward")},
		readKernel(asm.R7, p.t.tgid, 4, "spared"),
		{
			asm.LoadMem(asm.R1, asm.RFP, slotRead, asm.Word),
			asm.StoreMem(asm.RFP, slotPids, asm.R1, asm.Word),
		},
		mapCall(p.m.held.FD(), slotPids, asm.FnMapDeleteElem),
		{asm.JNE.Imm(asm.R0, 0, "onward")},
		{asm.StoreMem(asm.RFP, slotStop, asm.R7, asm.DWord)},
		k.goOn(asm.R7, "onward"),
		{
			asm.LoadMem(asm.R7, asm.RFP, slotStop, asm.DWord),
			asm.Sub.Imm(asm.R8, 1).WithSymbol("onward"),
			asm.JNE.Imm(asm.R8, 0, "down"),
		},
		{asm.Mov.Imm(asm.R0, 0).WithSymbol("spared")},
	} {
		ins = append(ins, step...)
	}
	return ins
}

// labelled gives the first of some instructions a label.
func labelled(label string, ins asm.Instructions) asm.Instructions {
	ins[0] = ins[0].WithSymbol(label)
	return ins
}

// Where the ids of process group and session are in signal_struct.pids: at
// PIDTYPE_PGID and PIDTYPE_SID of the kernel's enum pid_type.
const (
	groupPID   = 2 * 8
	sessionPID = 3 * 8
)

// isJob goes to yes if the task in R6 is in another process group than the first one
// of its session: only such a group can be orphaned by the end of a process of its
// session.
func (p *spaceProgram) isJob(yes string) asm.Instructions {
	ins := readPointer(asm.R7, asm.R6, p.t.signal, yes)
	ins = append(ins, readPointer(asm.R3, asm.R7, p.t.pids+groupPID, yes)...)
	ins = append(ins, asm.StoreMem(asm.RFP, slotStop, asm.R3, asm.DWord))
	ins = append(ins, readPointer(asm.R3, asm.R7, p.t.pids+sessionPID, yes)...)
	return append(ins,
		asm.LoadMem(asm.R1, asm.RFP, slotStop, asm.DWord),
		asm.JNE.Reg(asm.R1, asm.R3, yes),
	)
}

// wholeProcess is PIDTYPE_TGID of the kernel's enum pid_type.
const wholeProcess = 1
