package replay

import "context"

// Take and Give are what a flow does.
func (b *Budget) Take(ctx context.Context) error { return b.take(ctx) }

// Give gives a place back.
func (b *Budget) Give() { b.give() }
