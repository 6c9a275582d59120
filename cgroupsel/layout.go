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

// readLayout asks the kernel's own type information (CONFIG_DEBUG_INFO_BTF),
// so that no header and no compiler are needed.
func readLayout() (*layout, error) {
	spec, err := btf.LoadKernelSpec()
	if err != nil {
		return nil, fmt.Errorf("read kernel types: %w", err)
	}
	var l layout
	for _, m := range []struct {
		typ, member string
		to          *int32
	}{
		{"cgroup", "self", &l.cgroupSelf},
		{"cgroup", "kn", &l.cgroupKn},
		{"cgroup", "root", &l.cgroupRoot},
		{"cgroup_subsys_state", "parent", &l.cssParent},
		{"kernfs_node", "id", &l.knID},
		{"cgroup_root", "hierarchy_id", &l.hierarchyID},
	} {
		var s *btf.Struct
		if err := spec.TypeByName(m.typ, &s); err != nil {
			return nil, fmt.Errorf("find struct %s: %w", m.typ, err)
		}
		off, ok := offsetOf(s.Members, m.member)
		if !ok {
			return nil, fmt.Errorf("find %s in struct %s: this kernel has none", m.member, m.typ)
		}
		*m.to = int32(off)
	}
	return &l, nil
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
