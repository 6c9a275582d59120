// Package arch has no code of its own: its tests hold the shape of the project,
// by reading the source files themselves. They check who imports whom, which
// library belongs to which package, that files and functions stay small, that
// every exported name is documented, and that no text says what it should not.
//
// The tests do not ask the go command: the test cache would not notice that
// the files it reads have changed.
package arch
