package router

import (
	"context"
	"hash/maphash"

	"cgtun/flow"
)

// lookups bounds how many owners are looked up at a time, in all and of flows of one
// attachment: each takes 128 KiB of stack for a moment, and the kernel's time, and a
// flood of flows asks for thousands. Others do not wait for those of one.
type lookups struct {
	seed maphash.Seed
	all  chan struct{}
	some [64]chan struct{} // by a hash of the attachment's id
}

const maxLookups, maxLookupsOfOne = 32, 8

func (l *lookups) init() {
	l.seed, l.all = maphash.MakeSeed(), make(chan struct{}, maxLookups)
	for i := range l.some {
		l.some[i] = make(chan struct{}, maxLookupsOfOne)
	}
}

// begin waits for a place, and returns what gives it back; nil when ctx ends.
func (l *lookups) begin(ctx context.Context, attachment string) (end func()) {
	of := l.some[maphash.String(l.seed, attachment)%uint64(len(l.some))]
	select {
	case of <- struct{}{}:
	case <-ctx.Done():
		return nil
	}
	select {
	case l.all <- struct{}{}:
	case <-ctx.Done():
		<-of
		return nil
	}
	return func() { <-l.all; <-of }
}

func (r *Router) owner(ctx context.Context, f *flow.Flow) *flow.Owner {
	if r.opts.Owners == nil {
		return nil
	}
	end := r.lookups.begin(ctx, f.Attachment)
	if end == nil {
		return nil
	}
	defer end()
	ctx, cancel := context.WithTimeout(ctx, r.opts.OwnerTimeout)
	defer cancel()
	var owner *flow.Owner
	err := r.aside(func() (err error) {
		owner, err = r.opts.Owners.Owner(ctx, f)
		return err
	})
	if err != nil {
		r.counts.ownersUnknown.Add(1)
		r.log.Debug("no owner of flow", "flow", f.ID, "attachment", f.Attachment, "err", err)
		return &flow.Owner{Lost: true}
	}
	return owner
}
