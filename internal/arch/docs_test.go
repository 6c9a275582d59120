package arch_test

import (
	"go/ast"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestPromisesNameTests wants each test that docs/reliability.md names to be
// there.
func TestPromisesNameTests(t *testing.T) {
	page, err := os.ReadFile(filepath.Join(root(t), "docs/reliability.md"))
	if err != nil {
		t.Fatal(err)
	}
	known := map[string]bool{}
	for _, s := range sources(t) {
		for _, d := range s.ast.Decls {
			if f, ok := d.(*ast.FuncDecl); ok && s.test {
				known[f.Name.Name] = true
			}
		}
	}
	named := regexp.MustCompile("`(Test[A-Za-z0-9]+)`").FindAllStringSubmatch(string(page), -1)
	if len(named) < 20 {
		t.Errorf("only %d tests are named", len(named))
	}
	for _, m := range named {
		if !known[m[1]] {
			t.Errorf("docs/reliability.md: there is no %s", m[1])
		}
	}
	if strings.Count(string(page), "\n|") < 20 {
		t.Error("docs/reliability.md has no tables of promises")
	}
}
