package cgroupsel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// # Theory of operation
//
// The socket programs write who made or connected a selected socket last, by
// the socket's cookie, which sock_diag(7) tells of a flow's socket. Sockets of
// others cost nothing. A process can end, its number be used again and its
// socket live on: so the time is written too, and a process that began after it
// is another one.

// maxSenders bounds the sockets whose process is remembered; the one asked for
// or written least recently goes first. About 4 MB of kernel memory.
const maxSenders = 32768

// sender is what the map has for a socket.
type sender struct {
	Boot uint64 // nanoseconds since boot
	PID  uint64 // of the thread group, in the first pid namespace
	Comm [16]byte
}

// Offsets in sender, and its size.
const (
	senderBoot  = 0
	senderPID   = 8
	senderComm  = 16
	senderBytes = 32
)

// firstPIDNamespace is the inode of the pid namespace that the kernel counts
// processes in (PROC_PID_INIT_INO).
const firstPIDNamespace = 0xeffffffc

// remember writes who has the socket of the context in R6. R7 and R8 stay.
func remember(m *maps) asm.Instructions {
	if m.senders == nil {
		return nil
	}
	ins := asm.Instructions{
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.FnGetSocketCookie.Call(),
		asm.StoreMem(asm.RFP, slotCookie, asm.R0, asm.DWord),
		asm.FnKtimeGetBootNs.Call(),
		asm.StoreMem(asm.RFP, slotSender+senderBoot, asm.R0, asm.DWord),
		asm.FnGetCurrentPidTgid.Call(),
		asm.RSh.Imm(asm.R0, 32),
		asm.StoreMem(asm.RFP, slotSender+senderPID, asm.R0, asm.DWord),
		asm.Mov.Reg(asm.R1, asm.RFP),
		asm.Add.Imm(asm.R1, slotSender+senderComm),
		asm.Mov.Imm(asm.R2, senderBytes-senderComm),
		asm.FnGetCurrentComm.Call(),
		asm.Mov.Reg(asm.R3, asm.RFP),
		asm.Add.Imm(asm.R3, slotSender),
		asm.Mov.Imm(asm.R4, 0),
	}
	return append(ins, mapCall(m.senders.FD(), slotCookie, asm.FnMapUpdateElem)...)
}

// tryRemember finds out whether this kernel lets socket programs ask for the
// process, and gives up the map where it does not.
func (s *Selector) tryRemember() error {
	err := s.allowed(FeatureProcess)
	var st unix.Stat_t
	if err == nil {
		err = unix.Stat("/proc/self/ns/pid", &st)
	}
	if err == nil && st.Ino != firstPIDNamespace {
		err = errors.New("cgtun is in a pid namespace, and BPF numbers processes outside of it")
	}
	if err == nil {
		err = tryPrograms(socketPrograms(s.maps, always(value{}, 0)))
	}
	if err != nil {
		err = errors.Join(err, s.maps.senders.Close())
		s.maps.senders = nil
	}
	return err
}

// PID finds the process that made or connected a selected socket last, by the
// socket's cookie (SO_COOKIE in socket(7)), and the path of its program, or
// where that cannot be read the name that the process has given itself. Both
// are as hostile as the process. False: it is not known, or has ended. Some
// tens of microseconds.
func (s *Selector) PID(cookie uint64) (pid int, program string, ok bool) {
	if s.maps == nil || s.maps.senders == nil {
		return 0, "", false
	}
	var by sender
	if err := s.maps.senders.Lookup(cookie, &by); err != nil {
		return 0, "", false
	}
	pid = int(by.PID)
	began, err := startOf(pid)
	if err != nil || began > by.Boot {
		return 0, "", false
	}
	comm, _, _ := bytes.Cut(by.Comm[:], []byte{0})
	program, err = os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil {
		program = string(comm)
	}
	return pid, strings.TrimSuffix(program, " (deleted)"), true
}

// tick is the unit of times in proc(5), USER_HZ, the same on all of Linux.
const tick = 1e9 / 100

// startOf is when a process began, in nanoseconds since boot, up to a tick
// early.
func startOf(pid int) (uint64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The name, in parentheses, can hold anything; fields count from behind it.
	const start = 22 - 3
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(fields) <= start {
		return 0, fmt.Errorf("read /proc/%d/stat: %d fields", pid, len(fields))
	}
	ticks, err := strconv.ParseUint(fields[start], 10, 64)
	return ticks * tick, err
}

// senderSize keeps the struct and the programs' offsets the same.
var _ = [1]struct{}{}[senderBytes-binary.Size(sender{})]
