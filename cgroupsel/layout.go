package cgroupsel

import (
	"fmt"

	"github.com/cilium/ebpf/btf"
)

// layout says where this kernel keeps what the programs read, in bytes.
type layout struct {
	cgroupSelf, cgroupKn, cgroupRoot int32 // struct cgroup
	cssParent                        int32 // struct cgroup_subsys_state
	knID                             int32 // struct kernfs_node
	hierarchyID                      int32 // struct cgroup_root
}

// member names a member of a kernel's struct and where its offset goes.
type member struct {
	typ, name string
	to        *int32
}

// readLayout asks the kernel's own type information (CONFIG_DEBUG_INFO_BTF),
// so that no header and no compiler are needed.
func (s *Selector) readLayout() (*layout, error) {
	var l layout
	err := s.readOffsets([]member{
		{"cgroup", "self", &l.cgroupSelf},
		{"cgroup", "kn", &l.cgroupKn},
		{"cgroup", "root", &l.cgroupRoot},
		{"cgroup_subsys_state", "parent", &l.cssParent},
		{"kernfs_node", "id", &l.knID},
		{"cgroup_root", "hierarchy_id", &l.hierarchyID},
	})
	return &l, err
}

// readOffsets finds members in the kernel's types.
func (s *Selector) readOffsets(members []member) error {
	types, err := s.types()
	if err != nil {
		return fmt.Errorf("read kernel types: %w", err)
	}
	return readOffsets(types, members)
}

func readOffsets(types *btf.Spec, members []member) error {
	for _, m := range members {
		var t *btf.Struct
		if err := types.TypeByName(m.typ, &t); err != nil {
			return fmt.Errorf("find struct %s: %w", m.typ, err)
		}
		off, ok := offsetOf(t.Members, m.name)
		if !ok {
			return fmt.Errorf("find %s in struct %s: this kernel has none", m.name, m.typ)
		}
		*m.to = int32(off)
	}
	return nil
}

// offsetOf looks a member up, also in structs and unions without a name.
func offsetOf(members []btf.Member, name string) (uint32, bool) {
	for _, m := range members {
		if m.Name == name {
			return m.Offset.Bytes(), true
		}
		if m.Name != "" {
			continue
		}
		var sub []btf.Member
		switch t := btf.UnderlyingType(m.Type).(type) {
		case *btf.Struct:
			sub = t.Members
		case *btf.Union:
			sub = t.Members
		}
		if off, ok := offsetOf(sub, name); ok {
			return m.Offset.Bytes() + off, true
		}
	}
	return 0, false
}
