package arch_test

import (
	"go/ast"
	"go/token"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// undocumented are methods that say by their name what they do, to readers and
// to the packages that call them.
var undocumented = []string{"Error", "String", "Unwrap", "Is", "As", "LogValue", "MarshalJSON", "MarshalText", "UnmarshalJSON",
	"UnmarshalText", "UnmarshalTOML", "Len", "Less", "Swap", "Read", "Write", "Close", "LocalAddr", "RemoteAddr",
	"SetDeadline", "SetReadDeadline", "SetWriteDeadline"}

func TestExportedNamesAreDocumented(t *testing.T) {
	for _, s := range sources(t) {
		if s.test {
			continue
		}
		for _, d := range s.ast.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				if d.Doc == nil && d.Name.IsExported() && receiverIsExported(d) && !(d.Recv != nil && slices.Contains(undocumented, d.Name.Name)) {
					t.Errorf("%s: %s is exported and not documented", s.line(d), d.Name.Name)
				}
			case *ast.GenDecl:
				for _, name := range undocumentedSpecs(d) {
					t.Errorf("%s: %s is exported and not documented", s.line(d), name)
				}
			}
		}
	}
}

func receiverIsExported(f *ast.FuncDecl) bool {
	if f.Recv == nil || len(f.Recv.List) == 0 {
		return true
	}
	e := f.Recv.List[0].Type
	for {
		switch x := e.(type) {
		case *ast.StarExpr:
			e = x.X
		case *ast.IndexExpr:
			e = x.X
		case *ast.IndexListExpr:
			e = x.X
		case *ast.Ident:
			return x.IsExported()
		default:
			return true
		}
	}
}

// undocumentedSpecs returns the exported names of a declaration that have
// neither a comment of their own nor, as a group, one above it.
func undocumentedSpecs(d *ast.GenDecl) (names []string) {
	if d.Doc != nil || d.Tok == token.IMPORT {
		return nil
	}
	for _, spec := range d.Specs {
		switch spec := spec.(type) {
		case *ast.TypeSpec:
			if spec.Name.IsExported() && spec.Doc == nil && spec.Comment == nil {
				names = append(names, spec.Name.Name)
			}
		case *ast.ValueSpec:
			for _, n := range spec.Names {
				if n.IsExported() && spec.Doc == nil && spec.Comment == nil {
					names = append(names, n.Name)
				}
			}
		}
	}
	return names
}

// forbidden are words that no text of the project has, and why.
var forbidden = []struct {
	words *regexp.Regexp
	why   string
}{
	{regexp.MustCompile(`(?i)\b(proxy\.golang\.org|sum\.golang\.org|registry-1\.docker\.io|index\.docker\.io|ghcr\.io|quay\.io|gcr\.io|` +
		`registry\.npmjs\.org|pypi\.org|files\.pythonhosted\.org|crates\.io|rubygems\.org|repo1?\.maven\.org|deb\.debian\.org|mcr\.microsoft\.com)\b`),
		"the name of a public registry: examples use registry.example"},
	{regexp.MustCompile("(^|[\\s\"'`(=:])/(root|work)(/|\\b)"), "a path of one machine"},
	{regexp.MustCompile(`\.\./shared\b|\b(FACTS|FACTS-BPF|FACTS-STACK|STYLE|CONTRACT|DESIGN|PERF|RELIABILITY|BRIEF)(\.md|\s+§)`), "a text that is not part of the project"},
	{regexp.MustCompile(`(?i)\b(claude|anthropic|openai|chatgpt|copilot|gpt-\d|llms?)\b|\bAI\b`), "how it was written"},
	{regexp.MustCompile(`(?i)\b(issues? #?\d|(later|this|next|earlier|another) issues?\b|this session\b|the lead\b)`), "how it was planned"},
	{regexp.MustCompile(`\b(TODO|FIXME|XXX|HACK)\b`), "unfinished work"},
}

// texts are the kinds of files that people read.
var texts = []string{".go", ".md", ".toml", ".sh", ".txtar", ".service", ".conf", ".mod", ".yml", ".yaml", ".c", ".h", ""}

func TestForbiddenWords(t *testing.T) {
	walk(t, func(name string, text []byte) {
		base := path.Base(name)
		if name == "internal/arch/words_test.go" || base == "LICENSE" || base == "go.sum" || !slices.Contains(texts, path.Ext(base)) {
			return
		}
		if slices.Contains(text, 0) {
			return // a program
		}
		for i, line := range strings.Split(string(text), "\n") {
			for _, f := range forbidden {
				if w := f.words.FindString(line); w != "" {
					t.Errorf("%s:%d: %q: %s", name, i+1, strings.TrimSpace(w), f.why)
				}
			}
		}
	})
}

// calls returns the selectors "pkg.Name" and "x.Name" that a file calls, by
// line.
func (s *source) calls() map[string]string {
	all := map[string]string{}
	ast.Inspect(s.ast, func(n ast.Node) bool {
		c, ok := n.(*ast.CallExpr)
		if !ok {
			return true
		}
		switch f := c.Fun.(type) {
		case *ast.Ident:
			all[s.line(c)+" "+f.Name] = f.Name
		case *ast.SelectorExpr:
			x, _ := f.X.(*ast.Ident)
			if x != nil {
				all[s.line(c)+" "+x.Name+"."+f.Sel.Name] = x.Name + "." + f.Sel.Name
			}
		}
		return true
	})
	return all
}

func TestForbiddenCalls(t *testing.T) {
	library := []string{"panic", "log.Fatal", "log.Fatalf", "log.Print", "log.Printf", "log.Println", "os.Exit"}
	for _, s := range sources(t) {
		for where, call := range s.calls() {
			skip := strings.HasSuffix(call, ".Skip") || strings.HasSuffix(call, ".Skipf") || strings.HasSuffix(call, ".SkipNow")
			if skip && s.pkg != "internal/labtest" {
				t.Errorf("%s: only labtest.Need skips", where)
			}
			main := strings.HasPrefix(s.pkg, "cmd/") || s.pkg == "internal/demo" || s.pkg == "internal/labtest"
			if !s.test && slices.Contains(library, call) && !(main && call == "os.Exit") {
				t.Errorf("%s: a library returns its errors", where)
			}
		}
	}
}

func TestEveryPackageLooksForLeaks(t *testing.T) {
	tested, looks := map[string]bool{}, map[string]bool{}
	for _, s := range sources(t) {
		if !s.test {
			continue
		}
		for _, d := range s.ast.Decls {
			f, ok := d.(*ast.FuncDecl)
			if ok && strings.HasPrefix(f.Name.Name, "Test") && f.Name.Name != "TestMain" {
				tested[s.pkg] = true
			}
		}
		for _, call := range s.calls() {
			if call == "labtest.Main" || call == "goleak.VerifyTestMain" {
				looks[s.pkg] = true
			}
		}
	}
	for pkg := range tested {
		if !looks[pkg] {
			t.Errorf("%s: no TestMain that calls labtest.Main or goleak.VerifyTestMain", pkg)
		}
	}
}
