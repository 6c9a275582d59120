package dialer

// The tests dial from namespaces, and so on the thread that is there.
func init() { onOwnStack = func(f func()) { f() } }
