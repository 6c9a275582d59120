package replay

// Take and Give are what a flow does.
func (b *Budget) Take() bool { return b.take() }

// Give gives a place back.
func (b *Budget) Give() { b.give() }
