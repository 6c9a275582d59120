// Package bench measures cgtun end to end, as ratios: the stack with router,
// outbound and relay in a process of its own, beside the kernel that routes the
// same packets, beside a plain relay between kernel sockets with splice(2), the
// most that a program that ends TCP can hope for, and beside the same with
// read(2) and write(2), the most for one that holds the bytes. All in one run, in rounds
// that alternate, in namespaces of its own: only ratios within a run mean
// anything. Where asked for, a group of two paths is measured beside one outbound, and
// that once more beside itself. It
// has nothing but tests; `make bench` runs it and docs/performance.md
// has figures.
package bench
