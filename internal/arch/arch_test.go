package arch_test

import (
	"go/ast"
	"go/format"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// imports says which packages of ours each package may import, apart from its
// tests. A new package gets a line here, and so a thought.
var imports = map[string][]string{
	".":              {}, // the embedded example of a configuration
	"flow":           {},
	"sniff":          {},
	"internal/netns": {},
	"doctor":         {},
	"rules":          {"flow"},
	"report":         {"flow"},
	"relay":          {"flow"},
	"dialer":         {"flow"},
	"group":          {"dialer", "flow"},
	"replay":         {"dialer", "flow"},
	"dns":            {"dialer", "flow"},
	"policy":         {"dialer", "flow"},
	"tun":            {"internal/netns", "doctor"},
	"cgroupsel":      {"internal/netns", "doctor"},
	"steer":          {"internal/netns", "doctor"},
	"docker":         {"cgroupsel", "internal/netns", "doctor"},
	"stack":          {"flow", "tun"},
	"tproxy":         {"flow", "internal/netns"},
	"router":         {"flow", "rules", "sniff", "dialer", "relay", "replay"},
	"attach":         {"cgroupsel", "steer", "tun", "flow", "internal/netns"},
	"control":        {"flow", "doctor"},
	"metrics":        {"flow"},
	// The packages that a table of the configuration belongs to.
	"config":           {"attach", "cgroupsel", "control", "dialer", "dns", "flow", "group", "policy", "router", "rules", "stack", "steer", "tun"},
	"cmd/cgtun":        {"*"},
	"bench":            {},
	"bench/survival":   {},
	"internal/arch":    {},
	"internal/demo":    {},
	"internal/labtest": {},
}

// owners says which packages may import a library: the ones that hide it from
// the others. A prefix of an import path stands for all below it.
var owners = map[string][]string{
	"gvisor.dev/gvisor":                   {"stack"},
	"github.com/google/nftables":          {"steer", "internal/labtest"},
	"github.com/mdlayher/netlink":         {"steer"},
	"github.com/songgao/water":            {"tun"},
	"github.com/cilium/ebpf":              {"cgroupsel"},
	"github.com/vishvananda/netlink":      {"steer", "attach", "tun", "cgroupsel", "dialer", "policy", "internal/labtest"},
	"github.com/vishvananda/netns":        {"steer", "attach", "tun", "dialer", "internal/netns"},
	"github.com/BurntSushi/toml":          {"config"},
	"github.com/gaissmai/bart":            {"rules", "policy"},
	"github.com/miekg/dns":                {"dns"},
	"github.com/prometheus/client_golang": {"metrics"},
	"github.com/coreos/go-systemd/v22":    {"cmd/cgtun", "cgroupsel"},
	"go.uber.org/goleak":                  {"internal/labtest"},
}

// A file of more than maxFile lines says why in a comment above its package
// clause, with the words "one file because".
const (
	maxFile     = 600
	maxFunction = 80
)

// source is a parsed Go file of the module.
type source struct {
	path string // from the root of the module, with slashes
	pkg  string // its directory
	test bool
	text []byte
	fset *token.FileSet
	ast  *ast.File
}

func (s *source) line(n ast.Node) string {
	return s.path + ":" + strconv.Itoa(s.fset.Position(n.Pos()).Line)
}

// root returns the directory of go.mod.
func root(t *testing.T) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
	}
	t.Fatal("no go.mod above the test")
	return ""
}

// walk calls f with each file of the tree that is the project's own.
func walk(t *testing.T, f func(path string, text []byte)) {
	t.Helper()
	top := root(t)
	err := filepath.WalkDir(top, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == ".git" || d.Name() == "fuzz" || name == filepath.Join(top, "build")) {
			return fs.SkipDir
		}
		if !d.Type().IsRegular() {
			return nil
		}
		rel, err := filepath.Rel(top, name)
		if err != nil {
			return err
		}
		text, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		f(filepath.ToSlash(rel), text)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// parsed is what sources has read: it takes a second with the race detector.
var parsed struct {
	once sync.Once
	all  []*source
}

// sources parses the Go files, without testdata and the module of the tools.
func sources(t *testing.T) []*source {
	t.Helper()
	parsed.once.Do(func() { parsed.all = parse(t) })
	if len(parsed.all) < 5 {
		t.Fatalf("only %d Go files found", len(parsed.all))
	}
	return parsed.all
}

func parse(t *testing.T) (all []*source) {
	t.Helper()
	walk(t, func(name string, text []byte) {
		if path.Ext(name) != ".go" || strings.Contains(name, "testdata/") || strings.HasPrefix(name, "internal/tools/") {
			return
		}
		s := &source{path: name, pkg: path.Dir(name), test: strings.HasSuffix(name, "_test.go"), text: text, fset: token.NewFileSet()}
		var err error
		if s.ast, err = parser.ParseFile(s.fset, name, text, parser.ParseComments|parser.SkipObjectResolution); err != nil {
			t.Errorf("%s: %v", name, err)
			return
		}
		all = append(all, s)
	})
	return all
}

func (s *source) imports() []string {
	var all []string
	for _, i := range s.ast.Imports {
		if p, err := strconv.Unquote(i.Path.Value); err == nil {
			all = append(all, p)
		}
	}
	return all
}

func TestImports(t *testing.T) {
	for _, s := range sources(t) {
		allowed, known := imports[s.pkg]
		if !known {
			t.Errorf("%s: package %s is not in the table of imports", s.path, s.pkg)
			continue
		}
		if s.test {
			continue
		}
		for _, i := range s.imports() {
			ours, ok := strings.CutPrefix(i, "cgtun/")
			if !ok {
				continue
			}
			if ours == "internal/labtest" {
				t.Errorf("%s: imports %s, which is for tests", s.path, i)
				continue
			}
			if !slices.Contains(allowed, ours) && !slices.Contains(allowed, "*") {
				t.Errorf("%s: %s may not import %s", s.path, s.pkg, i)
			}
		}
	}
}

func TestLibrariesHaveOwners(t *testing.T) {
	for _, s := range sources(t) {
		if s.test {
			continue
		}
		for _, i := range s.imports() {
			for lib, pkgs := range owners {
				if (i == lib || strings.HasPrefix(i, lib+"/")) && !slices.Contains(pkgs, s.pkg) {
					t.Errorf("%s: %s is for %v only", s.path, lib, pkgs)
				}
			}
		}
	}
}

// TestLibrariesHaveReasons wants a line in the architecture for each module that
// is imported, and none for one that is not.
func TestLibrariesHaveReasons(t *testing.T) {
	page, err := os.ReadFile(filepath.Join(root(t), "docs/architecture.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, table, found := strings.Cut(string(page), "\n## Libraries\n")
	if !found {
		t.Fatal("docs/architecture.md has no section about libraries")
	}
	unused := map[string]bool{}
	for line := range strings.Lines(table) {
		if cell := strings.Split(line, "|"); len(cell) > 2 && strings.Contains(cell[1], "/") {
			unused[strings.TrimSpace(cell[1])] = true
		}
	}
	reasons := slices.Collect(maps.Keys(unused))
	for _, s := range sources(t) {
		for _, i := range s.imports() {
			if first, _, _ := strings.Cut(i, "/"); !strings.Contains(first, ".") {
				continue
			}
			n := slices.IndexFunc(reasons, func(lib string) bool { return i == lib || strings.HasPrefix(i, lib+"/") })
			if n < 0 {
				t.Errorf("%s: docs/architecture.md has no reason for %s", s.path, i)
				continue
			}
			delete(unused, reasons[n])
		}
	}
	for lib := range unused {
		t.Errorf("docs/architecture.md has a reason for %s, which nothing imports", lib)
	}
}

func TestFormatted(t *testing.T) {
	for _, s := range sources(t) {
		want, err := format.Source(s.text)
		if err != nil || string(want) != string(s.text) {
			t.Errorf("%s: not formatted: run gofmt -w %s", s.path, s.path)
		}
	}
}

func TestFilesAndFunctionsAreSmall(t *testing.T) {
	for _, s := range sources(t) {
		if n := strings.Count(string(s.text), "\n"); n > maxFile && !saysWhyLong(s) {
			t.Errorf("%s: %d lines, more than %d, and no comment at its head says why (\"one file because …\")", s.path, n, maxFile)
		}
		if s.test {
			continue // their tables are data
		}
		for _, d := range s.ast.Decls {
			f, ok := d.(*ast.FuncDecl)
			if !ok {
				continue
			}
			n := s.fset.Position(f.End()).Line - s.fset.Position(f.Pos()).Line + 1
			if n > maxFunction {
				t.Errorf("%s: %s has %d lines, more than %d", s.line(f), f.Name.Name, n, maxFunction)
			}
		}
	}
}

func saysWhyLong(s *source) bool {
	for _, c := range s.ast.Comments {
		if c.Pos() < s.ast.Package && strings.Contains(c.Text(), "one file because") {
			return true
		}
	}
	return false
}

func TestPackagesHaveComments(t *testing.T) {
	seen, has := map[string]bool{}, map[string]bool{}
	for _, s := range sources(t) {
		if s.test {
			continue
		}
		seen[s.pkg] = true
		if s.ast.Doc != nil {
			has[s.pkg] = true
		}
	}
	for pkg := range seen {
		if !has[pkg] {
			t.Errorf("%s: no package comment: what it owns, what it does not, who calls it", pkg)
		}
	}
}
