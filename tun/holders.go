package tun

import (
	"errors"
	"fmt"
	"io"

	"cgtun/internal/netns"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
)

// Holders counts what keeps network namespaces alive: processes, sockets, mounts and
// descriptors, and the queues of devices that were made inside. Nothing of the kernel
// tells that but its own memory: a BPF program goes from a queue's descriptor to the
// count of references that its namespace has. Whoever has a descriptor that leads in,
// or is inside for a moment, counts; so what is read can be too much for a moment,
// but never too little. Safe for concurrent use.
type Holders struct{ program *ebpf.Program }

// OpenHolders loads the program, and counts what is known to see whether this kernel
// is what it takes it for. It wants BTF, CAP_BPF and CAP_PERFMON (Linux 5.10). The
// caller closes it.
func OpenHolders() (*Holders, error) {
	h, err := openHolders()
	if err != nil {
		return nil, fmt.Errorf("count the references of network namespaces: %w", err)
	}
	return h, nil
}

func openHolders() (_ *Holders, err error) {
	spec, err := btf.LoadKernelSpec()
	if err != nil {
		return nil, fmt.Errorf("read kernel types: %w", err)
	}
	program, err := countProgram(spec)
	if err != nil {
		return nil, err
	}
	h := &Holders{}
	if h.program, err = ebpf.NewProgram(program); err != nil {
		return nil, err
	}
	if err := h.try(); err != nil {
		return nil, errors.Join(err, h.Close())
	}
	return h, nil
}

// Close lets the program go.
func (h *Holders) Close() error { return h.program.Close() }

// try counts the references of a namespace that only a descriptor and a device of
// ours keep.
func (h *Holders) try() (err error) {
	ns, keeps, err := netns.Private()
	if err != nil {
		return err
	}
	defer keeps.Close()
	var q *Queue
	err = ns.Do(func() (err error) {
		q, err = attachQueue(temporaryPrefix, false)
		return err
	})
	if err != nil {
		return err
	}
	defer q.Close()
	for _, want := range []struct {
		let  io.Closer
		left int
	}{{nil, 2}, {keeps, 1}} {
		if want.let != nil {
			want.let.Close()
		}
		if n, err := h.count(q); err != nil || n != want.left {
			return fmt.Errorf("%d references where there are %d: %w", n, want.left, err)
		}
	}
	return nil
}

// Holders counts the references of the namespace that the device was made in, each
// queue's among them. After Close it is an error.
func (d *Device) Holders(h *Holders) (int, error) {
	n, err := h.count(d.queues[0])
	if err != nil {
		return 0, fmt.Errorf("count the references of %s: %w", d.ns, err)
	}
	return n, nil
}

// LetGo is Close for when nobody but the device keeps its namespace: readers of its
// queues return netns.ErrGone, as after any other end of it.
func (d *Device) LetGo() error {
	for _, q := range d.queues {
		q.letGo.Store(true)
	}
	return d.Close()
}

// count returns how many references there are of the namespace that q was opened in.
func (h *Holders) count(q *Queue) (n int, err error) {
	errControl := q.raw.Control(func(fd uintptr) {
		var count uint32
		count, err = h.program.Run(&ebpf.RunOptions{Context: countArgs{FD: uint64(fd)}})
		n = int(count)
	})
	if err = errors.Join(errControl, err); err == nil && n == 0 {
		err = errors.New("the descriptor leads nowhere")
	}
	return n, err
}

// countArgs are the arguments of the program, as of a raw tracepoint.
type countArgs struct{ FD uint64 }

// countProgram returns the count of references that the namespace of the tun's
// descriptor in its first argument has, which is one of the calling process:
//
//	task_struct.files → files_struct.fdt → fdtable.fd[FD] → file.private_data,
//	a tun_file, which begins with a sock → sock_common.skc_net → net.ns
//
// and 0 if anything of this cannot be read.
func countProgram(spec *btf.Spec) (*ebpf.ProgramSpec, error) {
	offset := func(name string, members ...string) (int32, error) {
		var s *btf.Struct
		if err := spec.TypeByName(name, &s); err != nil {
			return 0, fmt.Errorf("find struct %s: %w", name, err)
		}
		for _, m := range s.Members {
			for _, want := range members {
				if m.Name == want {
					return int32(m.Offset.Bytes()), nil
				}
			}
		}
		return 0, fmt.Errorf("find %s in struct %s: this kernel has none", members[0], name)
	}
	var errs []error
	at := func(name string, members ...string) int32 {
		off, err := offset(name, members...)
		errs = append(errs, err)
		return off
	}
	files, fdt, fds := at("task_struct", "files"), at("files_struct", "fdt"), at("fdtable", "fd")
	private, net := at("file", "private_data"), at("sock_common", "skc_net")
	count := at("net", "ns") + at("ns_common", "count", "__ns_ref")
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	const read = -8
	// load reads what R7 and an offset point to, into R7.
	load := func(off int32, size asm.Size, bytes int32) asm.Instructions {
		return asm.Instructions{
			asm.Mov.Reg(asm.R1, asm.RFP),
			asm.Add.Imm(asm.R1, read),
			asm.Mov.Imm(asm.R2, bytes),
			asm.Mov.Reg(asm.R3, asm.R7),
			asm.Add.Imm(asm.R3, off),
			asm.FnProbeReadKernel.Call(),
			asm.JNE.Imm(asm.R0, 0, "nowhere"),
			asm.LoadMem(asm.R7, asm.RFP, read, size),
		}
	}
	ins := asm.Instructions{
		asm.LoadMem(asm.R6, asm.R1, 0, asm.DWord),
		asm.LSh.Imm(asm.R6, 3),
		asm.FnGetCurrentTask.Call(),
		asm.Mov.Reg(asm.R7, asm.R0),
	}
	for _, off := range []int32{files, fdt, fds} {
		ins = append(ins, load(off, asm.DWord, 8)...)
	}
	ins = append(ins, asm.Add.Reg(asm.R7, asm.R6))
	for _, off := range []int32{0, private, net} {
		ins = append(ins, load(off, asm.DWord, 8)...)
	}
	ins = append(ins, load(count, asm.Word, 4)...)
	return &ebpf.ProgramSpec{Name: "cgtun_holders", Type: ebpf.RawTracepoint, License: "GPL", Instructions: append(ins,
		asm.Mov.Reg(asm.R0, asm.R7),
		asm.Return(),
		asm.Mov.Imm(asm.R0, 0).WithSymbol("nowhere"),
		asm.Return(),
	)}, nil
}
