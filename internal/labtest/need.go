package labtest

import (
	_ "embed" // tools.txt
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// AllEnv is the environment variable that turns each skip of Need into a
// failure, if it is "1". make test sets it.
const AllEnv = "CGTUN_TEST_ALL"

// SoakEnv is the environment variable that asks for the full numbers, which
// take hours, if it is "1". make soak sets it.
const SoakEnv = "CGTUN_SOAK"

// Soak tells whether the full numbers are asked for.
func Soak() bool { return os.Getenv(SoakEnv) == "1" }

// Requirement is something that a test cannot do without.
type Requirement struct {
	name  string
	how   string       // how to get it
	check func() error // says what is missing
}

// Root is the right to make namespaces and to change them.
var Root = Requirement{
	name: "root",
	how:  "run it with sudo, for example: sudo make test",
	check: func() error {
		if os.Geteuid() == 0 {
			return nil
		}
		return fmt.Errorf("effective user id is %d", os.Geteuid())
	},
}

// CgroupV2 is a cgroup2 hierarchy in which cgroups can be made.
var CgroupV2 = Requirement{
	name: "a writable cgroup2 hierarchy",
	how:  "mount -t cgroup2 none /sys/fs/cgroup/unified",
	check: func() error {
		root, err := cgroupRoot()
		if err != nil {
			return err
		}
		return unix.Access(root, unix.W_OK)
	},
}

//go:embed tools.txt
var toolList string

// debianPackage returns the package that has a program, "" if the list does
// not know it.
func debianPackage(tool string) string {
	for line := range strings.Lines(toolList) {
		if w := strings.Fields(line); len(w) == 2 && w[0] == tool {
			return w[1]
		}
	}
	return ""
}

// Tool is a program in the PATH. It must be in tools.txt, so that make test
// installs it.
func Tool(name string) Requirement {
	pkg := debianPackage(name)
	return Requirement{
		name: "the program " + name,
		how:  "apt-get install " + pkg,
		check: func() error {
			if pkg == "" {
				return fmt.Errorf("it is not in internal/labtest/tools.txt: add it there")
			}
			_, err := exec.LookPath(name)
			return err
		},
	}
}

// Need skips the test if a requirement is missing and says how to get it. It is
// the only skip in the project. With AllEnv it fails instead.
func Need(t testing.TB, reqs ...Requirement) {
	t.Helper()
	for _, r := range reqs {
		err := r.check()
		if err == nil {
			continue
		}
		msg := fmt.Sprintf("needs %s: %v\n\tto get it: %s", r.name, err, r.how)
		if os.Getenv(AllEnv) == "1" {
			t.Fatal(msg)
		}
		t.Skip(msg)
	}
}
