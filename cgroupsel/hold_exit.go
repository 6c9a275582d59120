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
type kfuncs struct {
	taskFromPID, sendSignal, taskRelease btf.TypeID
	countEntries                         btf.TypeID // of a map
	iterNew, iterNext, iterDestroy       btf.TypeID // of a loop that is verified once, not as often as it goes round
}

func (s *Selector) readKfuncs() (*kfuncs, error) {
	spec, err := s.types()
	if err != nil {
		return nil, fmt.Errorf("read kernel types: %w", err)
	}
	var k kfuncs
	for name, to := range map[string]*btf.TypeID{
		"bpf_task_from_pid":      &k.taskFromPID,
		"bpf_send_signal_task":   &k.sendSignal,
		"bpf_task_release":       &k.taskRelease,
		"bpf_map_sum_elem_count": &k.countEntries,
		"bpf_iter_num_new":       &k.iterNew,
		"bpf_iter_num_next":      &k.iterNext,
		"bpf_iter_num_destroy":   &k.iterDestroy,
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

// slotLoop is a struct bpf_iter_num.
const slotLoop = -112

// loop goes through body n times at most, and from body to done ends it. It leaves R6
// to R9 to the body.
func (k *kfuncs) loop(n int32, next, done string, body asm.Instructions) asm.Instructions {
	at := func(label string, id btf.TypeID) asm.Instructions {
		return asm.Instructions{
			asm.Mov.Reg(asm.R1, asm.RFP).WithSymbol(label),
			asm.Add.Imm(asm.R1, slotLoop),
			callKernel(id),
		}
	}
	ins := asm.Instructions{
		asm.Mov.Reg(asm.R1, asm.RFP),
		asm.Add.Imm(asm.R1, slotLoop),
		asm.Mov.Imm(asm.R2, 0),
		asm.Mov.Imm(asm.R3, n),
		callKernel(k.iterNew),
	}
	ins = append(ins, at(next, k.iterNext)...)
	ins = append(ins, asm.JEq.Imm(asm.R0, 0, done))
	ins = append(ins, body...)
	ins = append(ins, asm.Ja.Label(next))
	return append(ins, at(done, k.iterDestroy)...)
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
	)
	one := mapCall(p.m.order.FD(), slotPids, asm.FnMapPopElem)
	one = append(one, asm.JNE.Imm(asm.R0, 0, "all went on"))
	one = append(one, mapCall(p.m.held.FD(), slotPids, asm.FnMapLookupElem)...)
	one = append(one, asm.JEq.Imm(asm.R0, 0, "next"))
	one = append(one, k.goOn(asm.R7, "next")...)
	return append(ins, k.loop(maxHeld, "next", "all went on", one)...)
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

// maxMembers is how many of a session are looked at, the youngest first.
const maxMembers = 512

// What of a session is sent SIGHUP, if it is stopped, when a process ends.
const (
	spareOwn    = 1 << iota // its own process group: its parent is outside
	spareOthers             // other groups: those of its children
)

// spareOrphans continues who is held and would not outlive the end of the task in R6.
// A process group that loses its last member with a parent elsewhere in the session is
// sent SIGHUP if one of it is stopped (setpgid(2), POSIX.1-2024 _exit): a daemon whose
// parent ends as soon as it has forked it would die of its hold. Who of the group is
// held need not descend from who ends. This tracepoint comes before the kernel looks for
// such groups; who is about to be held in between sees that itself (endsAround).
//
// R7 goes through the members of the session; R9 is the own group.
func (p *spaceProgram) spareOrphans(k *kfuncs) asm.Instructions {
	var ins asm.Instructions
	for _, step := range []asm.Instructions{
		{
			asm.LoadMapPtr(asm.R1, p.m.held.FD()),
			callKernel(k.countEntries),
			asm.JEq.Imm(asm.R0, 0, "spared"),
			asm.Mov.Imm(asm.R1, 0),
			asm.StoreMem(asm.RFP, slotSpare, asm.R1, asm.DWord),
		},
		readPointer(asm.R7, asm.R6, p.t.signal, "spared"),
		readPointer(asm.R9, asm.R7, p.t.pids+groupPID, "spared"),
		readPointer(asm.R8, asm.R7, p.t.pids+sessionPID, "spared"),
		readPointer(asm.R3, asm.R6, p.t.realParent, "spared"),
		readPointer(asm.R7, asm.R3, p.t.signal, "spared"),
		readPointer(asm.R3, asm.R7, p.t.pids+groupPID, "spared"),
		{asm.JEq.Reg(asm.R3, asm.R9, "children")},
		readPointer(asm.R3, asm.R7, p.t.pids+sessionPID, "spared"),
		{
			asm.JNE.Reg(asm.R3, asm.R8, "children"),
			asm.Mov.Imm(asm.R1, spareOwn),
			asm.StoreMem(asm.RFP, slotSpare, asm.R1, asm.DWord),
		},
		labelled("children", readPointer(asm.R3, asm.R6, p.t.children, "spared")),
		{
			asm.LoadMem(asm.R2, asm.RFP, slotSpare, asm.DWord),
			asm.Mov.Reg(asm.R1, asm.R6),
			asm.Add.Imm(asm.R1, p.t.children),
			asm.JEq.Reg(asm.R1, asm.R3, "members"),
			asm.Or.Imm(asm.R2, spareOthers),
			asm.StoreMem(asm.RFP, slotSpare, asm.R2, asm.DWord),
			asm.JEq.Imm(asm.R2, 0, "spared").WithSymbol("members"),
		},
		readPointer(asm.R7, asm.R8, p.t.tasks+sessionPID, "spared"),
		k.loop(maxMembers, "member", "all seen", p.spareMember(k)),
		{asm.Mov.Imm(asm.R0, 0).WithSymbol("spared")},
	} {
		ins = append(ins, step...)
	}
	return ins
}

// spareMember continues the process in R7, if it is to be spared, and goes on to the
// next one.
func (p *spaceProgram) spareMember(k *kfuncs) asm.Instructions {
	var ins asm.Instructions
	for _, step := range []asm.Instructions{
		{asm.JEq.Imm(asm.R7, 0, "all seen")},
		readKernel(asm.R7, p.t.tgid-p.t.memberOf(sessionPID), 4, "all seen"),
		{
			asm.LoadMem(asm.R1, asm.RFP, slotRead, asm.Word),
			asm.StoreMem(asm.RFP, slotPids, asm.R1, asm.Word),
		},
		mapCall(p.m.held.FD(), slotPids, asm.FnMapLookupElem),
		{asm.JEq.Imm(asm.R0, 0, "onward")},
		readPointer(asm.R3, asm.R7, p.t.signal-p.t.memberOf(sessionPID), "all seen"),
		readPointer(asm.R3, asm.R3, p.t.pids+groupPID, "all seen"),
		{
			asm.LoadMem(asm.R1, asm.RFP, slotSpare, asm.DWord),
			asm.Mov.Imm(asm.R2, spareOwn),
			asm.JEq.Reg(asm.R3, asm.R9, "of its own group"),
			asm.Mov.Imm(asm.R2, spareOthers),
			asm.And.Reg(asm.R1, asm.R2).WithSymbol("of its own group"),
			asm.JEq.Imm(asm.R1, 0, "onward"),
		},
		mapCall(p.m.held.FD(), slotPids, asm.FnMapDeleteElem),
		{asm.JNE.Imm(asm.R0, 0, "onward")},
		k.goOn(asm.R8, "onward"),
		labelled("onward", readPointer(asm.R7, asm.R7, 0, "all seen")),
	} {
		ins = append(ins, step...)
	}
	return ins
}

// endsAround goes to yes if the task in R6, which has its entry in held, is of a job
// whose first process or its own parent ends: that looked for it before (spareOrphans),
// perhaps when it was not in held yet.
func (p *spaceProgram) endsAround(yes string) asm.Instructions {
	const exiting = 4 // PF_EXITING
	var ins asm.Instructions
	for _, step := range []asm.Instructions{
		p.isJob("job"),
		{asm.Ja.Label("nobody ends")},
		labelled("job", readPointer(asm.R3, asm.R6, p.t.realParent, yes)),
		readKernel(asm.R3, p.t.flags, 4, yes),
		{
			asm.LoadMem(asm.R1, asm.RFP, slotRead, asm.Word),
			asm.And.Imm(asm.R1, exiting),
			asm.JNE.Imm(asm.R1, 0, yes),
		},
		readPointer(asm.R3, asm.R6, p.t.signal, yes),
		readPointer(asm.R3, asm.R3, p.t.pids+groupPID, yes),
		readPointer(asm.R3, asm.R3, p.t.tasks+processPID, yes),
		{asm.JEq.Imm(asm.R3, 0, "nobody ends")},
		readKernel(asm.R3, p.t.flags-p.t.memberOf(processPID), 4, yes),
		{
			asm.LoadMem(asm.R1, asm.RFP, slotRead, asm.Word),
			asm.And.Imm(asm.R1, exiting),
			asm.JNE.Imm(asm.R1, 0, yes),
			asm.Mov.Imm(asm.R0, 0).WithSymbol("nobody ends"),
		},
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

// Where the ids of process, process group and session are in signal_struct.pids, and
// who has them in pid.tasks: at PIDTYPE_TGID, _PGID and _SID of the kernel's enum
// pid_type.
const (
	processPID = 1 * 8
	groupPID   = 2 * 8
	sessionPID = 3 * 8
)

// memberOf is where in a task the list is that goes through all who have such an id.
func (t *taskLayout) memberOf(id int32) int32 { return t.pidLinks + 2*id }

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
