package cgroupsel

// Selection is what one route captures.
type Selection struct {
	Cgroups    []string // plain paths from the root of cgroup2, "/a/b"; all below is selected too
	Netns      []string // names in /run/netns, or absolute paths
	Create     bool     // make those of Cgroups that are plain and missing
	Mark, Mask uint32   // fwmark of what is sent; Mask 0 is all bits
}

// value is what the maps hold for the selection with this index.
func (o Options) value(selection int) value {
	one := o.Selections[selection]
	return value{Mark: one.Mark & one.Mask, Mask: one.Mask, Selection: uint32(selection)}
}

// entry is one of Selection.Cgroups.
type entry struct {
	path      string
	selection int
}

// plain lists the plain paths of all selections.
func (o Options) plain() []entry {
	var all []entry
	for i, one := range o.Selections {
		for _, p := range one.Cgroups {
			all = append(all, entry{path: p, selection: i})
		}
	}
	return all
}
