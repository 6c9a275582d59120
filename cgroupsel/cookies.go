package cgroupsel

import (
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
)

// # Theory of operation: a gate without the cookie
//
// Kernels before 6.15 do not tell a program at egress which network namespace a
// packet is of, but tell those at the making of a socket and at connect. There the
// latter write it into the socket's own storage, from the start of cgtun on, and the gate
// reads it: sockets that were accepted have that of their listener. One that is older
// than cgtun, and has not connected since, has none: it passes.

// storageCreate is BPF_SK_STORAGE_GET_F_CREATE.
const storageCreate = 1

// cloneStorage is BPF_F_CLONE: accepted sockets get a copy.
const cloneStorage = 1 << 9

// findCookies makes the gate know the namespaces of packets, the one way or the
// other. Where there is neither, Arm says that there is no gate.
func (d *spaces) findCookies() {
	err := d.s.allowed(FeatureCookie)
	if err == nil {
		err = tryPrograms([]*ebpf.ProgramSpec{d.program.gateProgram(nil)})
	}
	if d.s.note(FeatureCookie, err) {
		return
	}
	err = d.s.allowed(FeatureGate)
	if err == nil {
		d.m.cookies, err = newCookies()
	}
	if err == nil {
		d.cookies, err = d.s.attachRoot(func(others []int32) []*ebpf.ProgramSpec {
			return d.program.cookiePrograms(bySel(d.s.maps, others))
		})
	}
	if err != nil {
		d.s.log.Debug("sockets cannot keep the cookie of their namespace", "err", err)
	}
}

func newCookies() (*ebpf.Map, error) {
	m, err := ebpf.NewMap(&ebpf.MapSpec{
		Name: "cgtun_cookies", Type: ebpf.SkStorage, KeySize: 4, ValueSize: 8, Flags: noPrealloc | cloneStorage,
		Key: &btf.Int{Name: "int", Size: 4, Encoding: btf.Signed}, Value: &btf.Int{Name: "u64", Size: 8},
	})
	if err != nil {
		return nil, fmt.Errorf("make map cgtun_cookies: %w", err)
	}
	return m, nil
}

// cookie puts the cookie of the namespace of the packet in R6 into R0, or leaves
// the program.
func (p *spaceProgram) cookie() asm.Instructions {
	if p.m.cookies == nil {
		return asm.Instructions{
			asm.Mov.Reg(asm.R1, asm.R6),
			asm.FnGetNetnsCookie.Call(),
		}
	}
	return asm.Instructions{
		asm.LoadMem(asm.R1, asm.R6, skbSock, asm.DWord),
		asm.JEq.Imm(asm.R1, 0, "out"),
		asm.FnSkFullsock.Call(),
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.Mov.Reg(asm.R2, asm.R0),
		asm.LoadMapPtr(asm.R1, p.m.cookies.FD()),
		asm.Mov.Imm(asm.R3, 0),
		asm.Mov.Imm(asm.R4, 0),
		asm.FnSkStorageGet.Call(),
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.LoadMem(asm.R0, asm.R0, 0, asm.DWord),
	}
}

// cookiePrograms write the cookie for those whom choose lets through.
func (p *spaceProgram) cookiePrograms(choose chooser) []*ebpf.ProgramSpec {
	one := func(name string, typ ebpf.ProgramType, at ebpf.AttachType, socket asm.Instructions) *ebpf.ProgramSpec {
		ins := append(asm.Instructions{asm.Mov.Reg(asm.R6, asm.R1)}, choose...)
		ins = append(ins,
			asm.Mov.Reg(asm.R1, asm.R6),
			asm.FnGetNetnsCookie.Call(),
			asm.Mov.Reg(asm.R7, asm.R0),
		)
		ins = append(ins, socket...)
		ins = append(ins,
			asm.LoadMapPtr(asm.R1, p.m.cookies.FD()),
			asm.Mov.Imm(asm.R3, 0),
			asm.Mov.Imm(asm.R4, storageCreate),
			asm.FnSkStorageGet.Call(),
			asm.JEq.Imm(asm.R0, 0, "out"),
			asm.StoreMem(asm.R0, 0, asm.R7, asm.DWord),
		)
		return program(name, typ, at, append(ins, leave(1)...))
	}
	connects := asm.Instructions{
		asm.LoadMem(asm.R2, asm.R6, sockAddrSock, asm.DWord),
		asm.JEq.Imm(asm.R2, 0, "out"),
	}
	return []*ebpf.ProgramSpec{
		one("cgtun_cookie", ebpf.CGroupSock, ebpf.AttachCGroupInetSockCreate, asm.Instructions{asm.Mov.Reg(asm.R2, asm.R6)}),
		one("cgtun_cookie4", ebpf.CGroupSockAddr, ebpf.AttachCGroupInet4Connect, connects),
		one("cgtun_cookie6", ebpf.CGroupSockAddr, ebpf.AttachCGroupInet6Connect, connects),
	}
}
