package cgroupsel

import (
	"errors"
	"fmt"

	"cgtun/internal/netns"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

// Holders counts what keeps network namespaces alive: processes, sockets, mounts and
// descriptors, and the descriptors of tuns that were opened inside. Nothing of the
// kernel tells that but its own memory: a BPF program goes from such a descriptor to
// the count of references that its namespace has. Whoever is inside for a moment
// counts; so what is read can be too much for a moment, but never too little. Safe
// for concurrent use.
type Holders struct{ program *ebpf.Program }

// OpenHolders loads the program, and counts what is known to see whether this kernel
// is what it takes it for. It wants BTF, CAP_BPF and CAP_PERFMON (Linux 5.11). The
// caller closes it.
func OpenHolders() (*Holders, error) {
	h, err := openHolders()
	if err != nil {
		return nil, fmt.Errorf("count the references of network namespaces: %w", err)
	}
	return h, nil
}

func openHolders() (*Holders, error) {
	types, err := btf.LoadKernelSpec()
	if err != nil {
		return nil, fmt.Errorf("read kernel types: %w", err)
	}
	l, err := readHolderLayout(types)
	if err != nil {
		return nil, err
	}
	h := &Holders{}
	if h.program, err = ebpf.NewProgram(l.program()); err != nil {
		return nil, fmt.Errorf("load: %w", err)
	}
	if err := h.try(); err != nil {
		return nil, errors.Join(err, h.Close())
	}
	return h, nil
}

// Close lets the program go.
func (h *Holders) Close() error { return h.program.Close() }

// Count returns how many references there are of the network namespace that a tun's
// descriptor was opened in, which is one of them.
func (h *Holders) Count(fd uintptr) (int, error) {
	n, err := h.program.Run(&ebpf.RunOptions{Context: holderArgs{FD: uint64(fd)}})
	if err == nil && n == 0 {
		err = errors.New("the descriptor leads nowhere")
	}
	if err != nil {
		return 0, fmt.Errorf("count the references of a network namespace: %w", err)
	}
	return int(n), nil
}

// try counts the references of a namespace that only a file and a tun keep.
func (h *Holders) try() error {
	ns, file, err := netns.Private()
	if err != nil {
		return err
	}
	defer file.Close()
	fd := -1
	err = ns.Do(func() (err error) {
		fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return fmt.Errorf("open /dev/net/tun: %w", err)
	}
	defer unix.Close(fd)
	for _, want := range []int{2, 1} {
		if n, err := h.Count(uintptr(fd)); err != nil || n != want {
			return errors.Join(fmt.Errorf("%d references where there are %d", n, want), err)
		}
		file.Close()
	}
	return nil
}

// holderLayout says where this kernel keeps what leads from a descriptor to a count.
type holderLayout struct {
	files, fdt, fds int32 // struct task_struct, files_struct, fdtable
	private         int32 // struct file
	net             int32 // struct sock_common
	ns, count       int32 // struct net, ns_common
}

func readHolderLayout(types *btf.Spec) (*holderLayout, error) {
	var l holderLayout
	members := []member{
		{"task_struct", "files", &l.files},
		{"files_struct", "fdt", &l.fdt},
		{"fdtable", "fd", &l.fds},
		{"file", "private_data", &l.private},
		{"sock_common", "skc_net", &l.net},
		{"net", "ns", &l.ns},
	}
	if err := readOffsets(types, members); err != nil {
		return nil, err
	}
	// Its name changed in 6.18.
	err := readOffsets(types, []member{{"ns_common", "__ns_ref", &l.count}})
	if err != nil {
		err = readOffsets(types, []member{{"ns_common", "count", &l.count}})
	}
	return &l, err
}

// holderArgs are the arguments of the program, as of a raw tracepoint.
type holderArgs struct{ FD uint64 }

// program returns the count of references that the namespace of the descriptor in its
// first argument has, which is one of the calling process and of a tun: what is
// private to that file begins with a struct sock. It is 0 if anything cannot be read.
func (l *holderLayout) program() *ebpf.ProgramSpec {
	ins := asm.Instructions{
		asm.LoadMem(asm.R6, asm.R1, 0, asm.DWord),
		asm.LSh.Imm(asm.R6, 3), // its place among pointers
		asm.FnGetCurrentTask.Call(),
		asm.Mov.Reg(asm.R7, asm.R0),
	}
	for _, off := range []int32{l.files, l.fdt, l.fds} {
		ins = append(ins, readPointer(asm.R7, asm.R7, off, "out")...)
	}
	ins = append(ins, asm.Add.Reg(asm.R7, asm.R6))
	for _, off := range []int32{0, l.private, l.net} {
		ins = append(ins, readPointer(asm.R7, asm.R7, off, "out")...)
	}
	ins = append(ins, readKernel(asm.R7, l.ns+l.count, 4, "out")...)
	ins = append(ins,
		asm.LoadMem(asm.R0, asm.RFP, slotRead, asm.Word),
		asm.Return(),
	)
	return program("cgtun_holders", ebpf.RawTracepoint, ebpf.AttachNone, append(ins, leave(0)...))
}
