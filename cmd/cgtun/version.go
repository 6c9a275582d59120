package main

import (
	"context"
	"fmt"
	"runtime"
	"runtime/debug"
)

// gvisor is the module of the network stack.
const gvisor = "gvisor.dev/gvisor"

// runVersion prints what this binary was made from.
func runVersion(_ context.Context, c *call) error {
	stack := "unknown"
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, dep := range info.Deps {
			if dep.Path == gvisor {
				stack = dep.Version
			}
		}
	}
	fmt.Fprintf(c.out, "cgtun %s %s %s/%s gvisor %s\n", version(), runtime.Version(), runtime.GOOS, runtime.GOARCH, stack)
	return nil
}

// version is that of the module, as the build recorded it.
func version() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}
