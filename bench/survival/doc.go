// Package survival measures what groups are worth: downloads over two paths that
// fail in turn, with cgtun and without, by each type of group and with features
// switched off. It has nothing but tests. `make test` runs `race` on three seeds
// side by side; `make soak` prints the whole table, which docs/reliability.md has.
package survival
