package cgroupsel

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"cgtun/internal/netns"
)

// # Theory of operation
//
// select.netns names files that lead to network namespaces. What is in such a
// namespace is marked by its cookie, which the socket programs look up in the
// map named; cgtun's own cgroup alone is exempt there, so that cgtun always
// has one of its own then.
//
// A name can come, go, or lead to another namespace. `ip netns add` makes the
// file first and mounts the namespace on it a moment later: inotify tells of the
// one, the mount table of the other.

// maxNamed bounds the names.
const maxNamed = 1024

// name is one of Selection.Netns.
type name struct {
	text      string
	selection int
	ref       netns.Ref // the zero Ref: it leads to none now
}

// names are the names of all selections. Only New and Run touch them, one
// after the other.
type names struct {
	all    []name
	warned map[string]bool // what two routes name, and was said
}

func newNames(o Options) *names {
	n := &names{warned: make(map[string]bool)}
	for i, one := range o.Selections {
		for _, text := range one.Netns {
			n.all = append(n.all, name{text: text, selection: i})
		}
	}
	return n
}

// path is the file of a name.
func (n *name) path() string { return filepath.Join(netnsDir(n.text), filepath.Base(n.text)) }

// netnsDir is where a name is.
func netnsDir(text string) string {
	if strings.Contains(text, "/") {
		return filepath.Dir(text)
	}
	return "/run/netns"
}

// dirs are where names can come and go.
func (n *names) dirs() []string {
	var all []string
	for i := range n.all {
		if dir := netnsDir(n.all[i].text); !slices.Contains(all, dir) {
			all = append(all, dir)
		}
	}
	return all
}

// resolve finds out where the names lead now. Unless told to look afresh it
// believes in a Ref as long as the inode is the same.
func (n *names) resolve(afresh bool) {
	for i := range n.all {
		one := &n.all[i]
		var st unix.Stat_t
		if !afresh && one.ref != (netns.Ref{}) && unix.Stat(one.path(), &st) == nil && st.Ino == one.ref.Inode() {
			continue
		}
		ref, err := netns.Named(one.text)
		if err != nil {
			ref = netns.Ref{}
		}
		one.ref = ref
	}
}

// moved says whether a name leads to another file than at the last look. It is
// cheap: a machine can mount all the time.
func (n *names) moved() bool {
	return slices.ContainsFunc(n.all, func(one name) bool {
		var st unix.Stat_t
		var fs unix.Statfs_t
		path := one.path()
		if unix.Statfs(path, &fs) != nil || fs.Type != unix.NSFS_MAGIC || unix.Stat(path, &st) != nil {
			return one.ref != (netns.Ref{})
		}
		return st.Ino != one.ref.Inode()
	})
}

// namespaces lists what the names lead to. Of two routes that name the same
// one, the first has it.
func (s *Selector) namespaces() []Namespace {
	var all []Namespace
	for _, one := range s.names.all {
		if one.ref == (netns.Ref{}) {
			continue
		}
		i := slices.IndexFunc(all, func(other Namespace) bool { return other.Ref.Cookie() == one.ref.Cookie() })
		if i < 0 {
			all = append(all, Namespace{Ref: one.ref, All: true, Selection: one.selection})
			continue
		}
		if all[i].Selection != one.selection && !s.names.warned[one.text] {
			s.names.warned[one.text] = true
			s.log.Warn("two routes name one network namespace: the first has it", "netns", one.text, "route", all[i].Selection+1, "other", one.selection+1)
		}
	}
	return all
}

// fillNamed makes the map say what is in all, and nothing else.
func (s *Selector) fillNamed(all []Namespace) error {
	if s.maps == nil || s.maps.named == nil {
		return nil
	}
	var errs []error
	there := make(map[uint64]bool)
	for _, one := range all {
		there[one.Ref.Cookie()] = true
		if err := s.maps.named.Put(one.Ref.Cookie(), s.value(one.Selection)); err != nil {
			errs = append(errs, fmt.Errorf("select network namespace %s: %w", one.Ref, err))
		}
	}
	var old []uint64
	var cookie uint64
	var v value
	for it := s.maps.named.Iterate(); it.Next(&cookie, &v); {
		if !there[cookie] {
			old = append(old, cookie)
		}
	}
	for _, cookie := range old {
		if err := s.maps.named.Delete(cookie); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, fmt.Errorf("unselect network namespace: %w", err))
		}
	}
	return errors.Join(errs...)
}

// tryNamed finds out whether this kernel lets socket programs ask for the
// namespace, and gives up the map where it does not.
func (s *Selector) tryNamed() error {
	err := s.allowed(FeatureNetns)
	if err == nil {
		err = tryPrograms(socketPrograms(s.maps, byNamed(s.maps, 0)))
	}
	if err != nil {
		err = errors.Join(err, s.maps.named.Close())
		s.maps.named = nil
	}
	return err
}

// orNamed is bySel where namespaces are selected, too. Who is in one belongs
// to it, whatever its cgroup; but an entry with mask 0 is cgtun itself.
func orNamed(m *maps, others []int32) chooser {
	ins := asm.Instructions{
		asm.FnGetCurrentCgroupId.Call(),
		asm.StoreMem(asm.RFP, slotID, asm.R0, asm.DWord),
	}
	ins = append(ins, mapCall(m.sel.FD(), slotID, asm.FnMapLookupElem)...)
	ins = append(ins,
		asm.Mov.Reg(asm.R9, asm.R0),
		asm.JEq.Imm(asm.R9, 0, "space"),
		asm.LoadMem(asm.R1, asm.R9, valueMask, asm.Word),
		asm.JEq.Imm(asm.R1, 0, "out"),
	)
	ins = append(ins, lookupNamed(m, "space")...)
	ins = append(ins,
		asm.JNE.Imm(asm.R0, 0, "chosen"),
		asm.Mov.Reg(asm.R0, asm.R9),
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.LoadMem(asm.R8, asm.R0, valueMask, asm.Word).WithSymbol("chosen"),
		asm.LoadMem(asm.R7, asm.R0, valueMark, asm.Word),
	)
	return chooser(append(ins, notOf(others)...))
}

// byNamed asks for the namespace alone: for a program at the root, where the
// cgroups have programs of their own.
func byNamed(m *maps, self uint64) chooser {
	ins := asm.Instructions{
		asm.FnGetCurrentCgroupId.Call(),
		asm.LoadImm(asm.R1, int64(self), asm.DWord),
		asm.JEq.Reg(asm.R0, asm.R1, "out"),
	}
	ins = append(ins, lookupNamed(m, "space")...)
	return chooser(append(ins,
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.LoadMem(asm.R8, asm.R0, valueMask, asm.Word),
		asm.LoadMem(asm.R7, asm.R0, valueMark, asm.Word),
	))
}

// lookupNamed looks the namespace of the context in R6 up. Its first
// instruction carries the label.
func lookupNamed(m *maps, label string) asm.Instructions {
	ins := asm.Instructions{
		asm.Mov.Reg(asm.R1, asm.R6).WithSymbol(label),
		asm.FnGetNetnsCookie.Call(),
		asm.StoreMem(asm.RFP, slotCookie, asm.R0, asm.DWord),
	}
	return append(ins, mapCall(m.named.FD(), slotCookie, asm.FnMapLookupElem)...)
}
