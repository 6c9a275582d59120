package cgroupsel

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// prefix is the path of our root from the real one, "" where they are the same.
// In a cgroup namespace (cgroup_namespaces(7)) nothing shows it but the path
// that the tracepoint is given: so a cgroup is made, and its path read.
func (t *tree) prefix(l *layout) (string, error) {
	top, err := inode(t.root)
	if err != nil {
		return "", err
	}
	if top == rootID {
		return "", nil
	}
	learned, err := ebpf.NewMap(&ebpf.MapSpec{Name: "cgtun_prefix", Type: ebpf.Array, KeySize: 4, ValueSize: pathBytes, MaxEntries: 1})
	if err != nil {
		return "", fmt.Errorf("make map cgtun_prefix: %w", err)
	}
	defer learned.Close()
	lk, err := attach(prefixProgram(learned, l, top), func(p *ebpf.Program) (io.Closer, error) {
		return link.AttachRawTracepoint(link.RawTracepointOptions{Name: "cgroup_mkdir", Program: p})
	})
	if err != nil {
		return "", err
	}
	err = t.touch(fmt.Sprintf("/.cgtun-prefix-%d", os.Getpid()))
	if err = errors.Join(err, lk.Close()); err != nil {
		return "", fmt.Errorf("learn the path of this cgroup namespace: %w", err)
	}
	var name [pathBytes]byte
	if err := learned.Lookup(uint32(0), &name); err != nil {
		return "", fmt.Errorf("learn the path of this cgroup namespace: %w", err)
	}
	text, _, _ := bytes.Cut(name[:], []byte{0})
	if len(text) == 0 || len(text) == pathBytes-1 {
		return "", errors.New("learn the path of this cgroup namespace: it is too long, or was not told; start cgtun outside of it")
	}
	// Another cgroup may have been made in our root since: it has the same
	// parent.
	return path.Dir(string(text)), nil
}

// touch makes a cgroup and removes it.
func (t *tree) touch(name string) error {
	if err := unix.Mkdirat(int(t.root.Fd()), path.Base(name), 0o755); err != nil {
		return err
	}
	return t.remove(name)
}

// prefixProgram stores the path of a cgroup made in the one with the id parent.
func prefixProgram(learned *ebpf.Map, l *layout, parent uint64) *ebpf.ProgramSpec {
	ins := asm.Instructions{
		asm.LoadMem(asm.R6, asm.R1, 0, asm.DWord),
		asm.LoadMem(asm.R8, asm.R1, 8, asm.DWord),
	}
	ins = append(ins, unifiedOnly(l)...)
	ins = append(ins, parentID(l)...)
	ins = append(ins,
		asm.LoadMem(asm.R1, asm.RFP, slotParent, asm.DWord),
		asm.LoadImm(asm.R2, int64(parent), asm.DWord),
		asm.JNE.Reg(asm.R1, asm.R2, "out"),
		asm.Mov.Imm(asm.R1, 0),
		asm.StoreMem(asm.RFP, slotIndex, asm.R1, asm.Word),
	)
	ins = append(ins, mapCall(learned.FD(), slotIndex, asm.FnMapLookupElem)...)
	ins = append(ins,
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.Mov.Reg(asm.R1, asm.R0),
		asm.Mov.Imm(asm.R2, pathBytes),
		asm.Mov.Reg(asm.R3, asm.R8),
		asm.FnProbeReadKernelStr.Call(),
		asm.Mov.Imm(asm.R0, 0).WithSymbol("lost"),
	)
	return program("cgtun_prefix", ebpf.RawTracepoint, ebpf.AttachNone, append(ins, leave(0)...))
}
