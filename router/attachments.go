package router

// AttachmentStats is what the flows of one attachment did since its first one.
type AttachmentStats struct {
	FlowsLive          int
	UpBytes, DownBytes uint64
}

// Attachments returns the counts of the attachments that have had flows, by id.
func (r *Router) Attachments() map[string]AttachmentStats {
	t := &r.table
	t.mu.Lock()
	defer t.mu.Unlock()
	stats := make(map[string]AttachmentStats, len(t.attachments))
	for id, s := range t.attachments {
		stats[id] = *s
	}
	for e := t.live.next; e != &t.live; e = e.next {
		s := stats[e.flow.Attachment]
		s.UpBytes += uint64(e.up.Load())
		s.DownBytes += uint64(e.down.Load())
		stats[e.flow.Attachment] = s
	}
	return stats
}

// ForgetAttachment drops the counts of an attachment that has ended, and all of
// its flows with it.
func (r *Router) ForgetAttachment(id string) {
	t := &r.table
	t.mu.Lock()
	defer t.mu.Unlock()
	if s := t.attachments[id]; s != nil && s.FlowsLive == 0 {
		delete(t.attachments, id)
	}
}

// of returns the counts of an attachment. Under t.mu.
func (t *table) of(id string) *AttachmentStats {
	if t.attachments == nil {
		t.attachments = map[string]*AttachmentStats{}
	}
	if t.attachments[id] == nil {
		t.attachments[id] = new(AttachmentStats)
	}
	return t.attachments[id]
}
