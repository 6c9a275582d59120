package steer_test

import (
	"os"
	"testing"

	"cgtun/internal/labtest"
)

// The test binary is also the program that runs inside of a lab: see
// helper_test.go.
func TestMain(m *testing.M) {
	if os.Getenv("STEER_HELPER") != "" {
		os.Exit(helper(os.Args[1:]))
	}
	labtest.Main(m)
}
