package cgroupsel

import "time"

// SelectedIDs lists the ids in the map, with those that are there as "not
// selected".
func (s *Selector) SelectedIDs() map[uint64]uint32 {
	masks := make(map[uint64]uint32)
	var id uint64
	var v value
	for it := s.maps.sel.Iterate(); it.Next(&id, &v); {
		masks[id] = v.Mask
	}
	return masks
}

// ParseMounts and Within are tested on their own.
var (
	ParseMounts = parseMounts
	Within      = within
)

// MountLine makes what ParseMounts returns readable.
func (m mount) String() string { return m.root + " " + m.dir + " " + m.options }

// LookEvery sets how often Run looks without having been told to. Before Run.
func (s *Selector) LookEvery(d time.Duration) { s.every = d }
