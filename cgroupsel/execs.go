package cgroupsel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/ringbuf"
)

// maxExecName is the longest name that the kernel keeps of a program whole.
const maxExecName = 15

// Execs calls seen with each process, by its number in the first pid namespace,
// that executes a program of this name, until ctx ends; first it calls ready,
// when none is missed any more. What a process calls itself counts for nothing
// else: the caller looks at what it really is. Bursts of more than a thousand can
// be cut short.
func Execs(ctx context.Context, name string, ready func(), seen func(pid int)) error {
	if name == "" || len(name) > maxExecName {
		return fmt.Errorf("follow programs: %q is not a name of 1 to %d bytes", name, maxExecName)
	}
	news, err := ebpf.NewMap(&ebpf.MapSpec{Name: "cgtun_execs", Type: ebpf.RingBuf, MaxEntries: newsBytes})
	if err != nil {
		return fmt.Errorf("follow programs: %w", err)
	}
	defer news.Close()
	lk, err := attach(execsProgram(news, name), func(p *ebpf.Program) (io.Closer, error) {
		return link.AttachRawTracepoint(link.RawTracepointOptions{Name: "sched_process_exec", Program: p})
	})
	if err != nil {
		return fmt.Errorf("follow programs: %w", err)
	}
	defer lk.Close()
	ring, err := ringbuf.NewReader(news)
	if err != nil {
		return fmt.Errorf("follow programs: %w", err)
	}
	defer ring.Close()
	defer context.AfterFunc(ctx, func() { ring.Close() })()
	ready()
	for {
		r, err := ring.Read()
		if errors.Is(err, ringbuf.ErrClosed) {
			return ctx.Err()
		}
		if err != nil {
			return fmt.Errorf("follow programs: %w", err)
		}
		if len(r.RawSample) >= 8 {
			seen(int(binary.NativeEndian.Uint64(r.RawSample)))
		}
	}
}

// execsProgram writes the process that has just got this name by exec.
func execsProgram(news *ebpf.Map, name string) *ebpf.ProgramSpec {
	const commSlot, pidSlot = -16, -24
	want := append([]byte(name), make([]byte, maxExecName+1-len(name))...)
	ins := asm.Instructions{
		asm.Mov.Reg(asm.R1, asm.RFP),
		asm.Add.Imm(asm.R1, commSlot),
		asm.Mov.Imm(asm.R2, maxExecName+1),
		asm.FnGetCurrentComm.Call(), // with zeros behind it
	}
	for at := int16(0); at <= 8; at += 8 {
		ins = append(ins,
			asm.LoadMem(asm.R1, asm.RFP, commSlot+at, asm.DWord),
			asm.LoadImm(asm.R2, int64(binary.NativeEndian.Uint64(want[at:])), asm.DWord),
			asm.JNE.Reg(asm.R1, asm.R2, "out"),
		)
	}
	ins = append(ins,
		asm.FnGetCurrentPidTgid.Call(),
		asm.RSh.Imm(asm.R0, 32),
		asm.StoreMem(asm.RFP, pidSlot, asm.R0, asm.DWord),
		asm.LoadMapPtr(asm.R1, news.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, pidSlot),
		asm.Mov.Imm(asm.R3, 8),
		asm.Mov.Imm(asm.R4, 0),
		asm.FnRingbufOutput.Call(),
	)
	return program("cgtun_execs", ebpf.RawTracepoint, ebpf.AttachNone, append(ins, leave(0)...))
}
