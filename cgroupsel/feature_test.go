package cgroupsel_test

import (
	"os"
	"strings"
	"testing"

	"cgtun/cgroupsel"
)

// The docs list each part of the kernel that is tried, and what is lost without it.
func TestFeaturesAreDocumented(t *testing.T) {
	text, err := os.ReadFile("../docs/reliability.md")
	if err != nil {
		t.Fatal(err)
	}
	if want := strings.Join(cgroupsel.FeatureRows(), "\n") + "\n"; !strings.Contains(string(text), want) {
		t.Errorf("docs/reliability.md lacks\n%s", want)
	}
}
