package config_test

import (
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/BurntSushi/toml"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.uber.org/goleak"

	"cgtun/config"
)

var update = flag.Bool("update", false, "write what is got into the files of what is wanted")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// golden compares got with a file, or makes it the file's content.
func golden(t *testing.T, file, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", file, diff)
	}
}

// examples returns the files of a folder of testdata/config.
func examples(t *testing.T, folder string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("../testdata/config", folder, "*.toml"))
	if err != nil || len(files) == 0 {
		t.Fatalf("%s: %d files, %v", folder, len(files), err)
	}
	return files
}

// One file for each mistake, beside it exactly what the user reads.
func TestBadFiles(t *testing.T) {
	for _, file := range examples(t, "bad") {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".toml"), func(t *testing.T) {
			_, err := config.Load(file, os.LookupEnv)
			var all config.Errors
			if !errors.As(err, &all) {
				t.Fatalf("no mistake found, but %v", err)
			}
			for _, e := range all {
				if e.Line == 0 {
					t.Errorf("without a place: %v", e)
				}
			}
			got := strings.ReplaceAll(err.Error(), "../testdata/config/", "") + "\n"
			golden(t, strings.TrimSuffix(file, ".toml")+".want", got)
		})
	}
}

func TestFileThatCannotBeRead(t *testing.T) {
	dir := t.TempDir()
	large := filepath.Join(dir, "large.toml")
	if err := os.WriteFile(large, []byte(strings.Repeat("# padding\n", 200_000)), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ name, path, want string }{
		{"missing", dir + "/none.toml", dir + "/none.toml: cannot be read: no such file or directory; allowed: a readable TOML file (cgtun init writes an example)"},
		{"a folder", dir, dir + ": cannot be read: is a directory; allowed: a readable TOML file (cgtun init writes an example)"},
		{"too large", large, large + ": is larger than 1MiB; allowed: a readable TOML file (cgtun init writes an example)"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := config.Load(tt.path, nil)
			var all config.Errors
			if !errors.As(err, &all) || err.Error() != tt.want {
				t.Errorf("got  %v\nwant %s", err, tt.want)
			}
		})
	}
}

// cgtun check -c <(generator) works.
func TestFileThatIsAPipe(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := w.WriteString("[log]\nlevel = \"debug\"\n"); err != nil {
		t.Fatal(err)
	}
	w.Close()
	f, err := config.Load(fmt.Sprintf("/proc/self/fd/%d", r.Fd()), nil)
	if err != nil || f.Log.SlogLevel() != slog.LevelDebug {
		t.Errorf("%+v, %v", f, err)
	}
}

// What each good file says, defaults and all, as it is used.
func TestGoodFiles(t *testing.T) {
	for _, file := range examples(t, "good") {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".toml"), func(t *testing.T) {
			f, err := config.Load(file, os.LookupEnv)
			if err != nil {
				t.Fatal(err)
			}
			golden(t, strings.TrimSuffix(file, ".toml")+".want", text(t, f))
		})
	}
}

// text writes a file as TOML, with what is not in its own text as comments.
func text(t *testing.T, f *config.File) string {
	t.Helper()
	var b strings.Builder
	for _, says := range f.NotServed() {
		b.WriteString("# " + says + "\n")
	}
	for i, r := range f.Rules {
		fmt.Fprintf(&b, "# rule %d: line %d, listed %v\n", i+1, r.Line, r.Listed)
	}
	for _, r := range f.Routes() {
		b.WriteString("# via " + r.Via.String() + "\n")
	}
	encoder := toml.NewEncoder(&b)
	encoder.Indent = ""
	for _, part := range []any{map[string]any{"route": f.Routes()}, f} {
		if err := encoder.Encode(part); err != nil {
			t.Fatal(err)
		}
	}
	return b.String()
}

func TestDefaultIsTheEmptyFile(t *testing.T) {
	f, err := config.Parse("default", nil)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(text(t, f), text(t, config.Default())); diff != "" {
		t.Errorf("empty file (-) and Default (+):\n%s", diff)
	}
}

// The example changes nothing but what cgtun init is to teach.
func TestExampleSaysTheDefaults(t *testing.T) {
	onDisk, err := os.ReadFile("../config.toml.example")
	if err != nil {
		t.Fatal(err)
	}
	if string(onDisk) != config.Example {
		t.Error("the embedded example is another one than config.toml.example")
	}
	f, err := config.Parse("config.toml.example", []byte(config.Example))
	if err != nil {
		t.Fatal(err)
	}
	got, want := f.Routes(), config.Default().Routes()
	if diff := cmp.Diff(want, got, cmpopts.EquateEmpty(), cmpopts.EquateComparable(netip.Prefix{}, netip.Addr{}, netip.AddrPort{})); diff != "" {
		t.Errorf("routes of the example (-default +example):\n%s", diff)
	}
	if len(f.Rules) != 1 || f.Rules[0].Use != "direct" || f.Control != config.Default().Control || f.Log != config.Default().Log || f.Limits != config.Default().Limits {
		t.Errorf("the example sets something: %s", text(t, f))
	}
}

// What stands in the example behind a # to be taken is right too.
func TestExampleUncommented(t *testing.T) {
	var b strings.Builder
	for line := range strings.Lines(config.Example) {
		code := strings.TrimPrefix(line, "# ")
		if key, _, ok := strings.Cut(code, "="); strings.HasPrefix(code, "[[") || ok && !strings.Contains(strings.TrimSpace(key), " ") {
			line = code
		}
		b.WriteString(line)
	}
	f, err := config.Parse("example", []byte(b.String()))
	if err != nil {
		t.Fatalf("%v\n%s", err, b.String())
	}
	if len(f.Outbounds) != 3 || len(f.Rules) != 3 {
		t.Errorf("%d outbounds and %d rules, want 3 and 3:\n%s", len(f.Outbounds), len(f.Rules), b.String())
	}
}

// For each key of the file: misspelt it is named with its place and what was
// meant; with a wrong type it is reported at its value.
func TestEveryKey(t *testing.T) {
	for _, k := range keys() {
		t.Run(k.path, func(t *testing.T) {
			header, indent := k.header()
			misspelt := k.name[:len(k.name)-1] + "_" + k.name[len(k.name)-1:]
			_, err := config.Parse("f", []byte(header+misspelt+" = 1\n"))
			want := fmt.Sprintf("f:%d:1: unknown key %q in [%s]; the nearest known one is %q", indent, misspelt, k.table(), k.name)
			if k.name == "by" { // too short to be told from another
				want = fmt.Sprintf("f:%d:1: unknown key %q in [%s]", indent, misspelt, k.table())
			}
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("misspelt:\n got %v\nwant %s", err, want)
			}
			_, err = config.Parse("f", []byte(header+k.name+" = [[1979-05-27]]\n"))
			want = fmt.Sprintf("f:%d:%d: %s ", indent, len(k.name)+4, k.path)
			if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "; allowed: ") {
				// A key that takes no list is told at the list, not in it.
				want = fmt.Sprintf("f:%d:%d: %s ", indent, len(k.name)+5, k.path)
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("wrong type:\n got %v\nwant %s", err, want)
				}
			}
		})
	}
}

func TestAllMistakesAtOnce(t *testing.T) {
	var b strings.Builder
	for i := range 500 {
		fmt.Fprintf(&b, "[[rule]]\nport = %d\ncidr = \"x\"\nuse = \"nowhere\"\n", 70000+i)
	}
	_, err := config.Parse("f", []byte(b.String()))
	var all config.Errors
	if !errors.As(err, &all) || len(all) != 1500 {
		t.Errorf("%d mistakes reported, want 1500", len(all))
	}
}

func TestLargeAndDeepFilesEnd(t *testing.T) {
	for _, tt := range []struct{ name, data string }{
		{"prefixes", "[[rule]]\nuse = \"direct\"\ncidr = [" + strings.Repeat(`"10.1.2.0/24",`, 70_000) + "]\n"},
		{"mistakes", "[[rule]]\nuse = \"direct\"\ncidr = [" + strings.Repeat("1,", 100_000) + "]\n"},
		{"open brackets", "a = " + strings.Repeat("[", 200_000)},
		{"nested lists", "a = " + strings.Repeat("[", 100_000) + strings.Repeat("]", 100_000)},
		{"rules", strings.Repeat("[[rule]]\nport = 1\nuse = \"drop\"\n", 5_000)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			start := time.Now()
			_, err := config.Parse("f", []byte(tt.data))
			t.Logf("%d bytes in %v", len(tt.data), time.Since(start))
			if wrong := tt.name != "prefixes" && tt.name != "rules"; wrong != (err != nil) {
				t.Errorf("error: %.200v", err)
			}
		})
	}
}
