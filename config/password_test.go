package config_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"cgtun/config"
)

// withPassword is a file with one proxy; the key stands in line 6.
func withPassword(key, value string) string {
	return fmt.Sprintf("[[outbound]]\nname = \"a\"\ntype = \"http\"\nserver = \"192.0.2.1:3128\"\nusername = \"u\"\n%s = %q\n", key, value)
}

// mistakes loads a file and returns what is said of its passwords.
func mistakes(t *testing.T, path, text string, env config.Env) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := config.Load(path, env)
	if err == nil && env != nil && f.Outbounds[0].Password.Reveal() != "hunter2" {
		t.Error("the password is another one than was given")
	}
	var all config.Errors
	errors.As(err, &all)
	var about []string
	for _, e := range all {
		if strings.Contains(e.Msg, "password") {
			about = append(about, strings.TrimPrefix(e.Error(), filepath.Dir(path)+"/"))
		}
	}
	return strings.Join(about, "\n")
}

// A password file that others can read, or that is no file, is refused before
// anything is read of it or waited for, and what mends it is told.
func TestPasswordFiles(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string, mode os.FileMode) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := errors.Join(os.WriteFile(path, []byte(text), 0o600), os.Chmod(path, mode)); err != nil {
			t.Fatal(err)
		}
	}
	write("good", "hunter2\n", 0o600)
	write("read only", "hunter2", 0o400)
	write("crlf", "hunter2\r\n", 0o600)
	write("readable", "hunter2\n", 0o644)
	write("its", "hunter2\n", 0o640)
	write("writable's", "hunter2\n", 0o602)
	write("empty", "\n", 0o600)
	write("lines", "hunter2\nhunter3\n", 0o600)
	write("large", strings.Repeat("hunter2", 1000), 0o600)
	if err := errors.Join(os.Symlink("good", filepath.Join(dir, "link")), unix.Mkfifo(filepath.Join(dir, "pipe"), 0o600)); err != nil {
		t.Fatal(err)
	}
	const allowed = "allowed: a file that only root or its owner can read"
	for _, tt := range []struct{ file, want string }{
		{"good", ""},
		{filepath.Join(dir, "good"), ""},
		{"read only", ""},
		{"crlf", ""},
		{"readable", "has mode 0644, so that others can read or change it; " + allowed + " (chmod 600 DIR/readable)"},
		{"its", "has mode 0640, so that others can read or change it; " + allowed + " (chmod 600 DIR/its)"},
		{"writable's", "has mode 0602, so that others can read or change it; " + allowed + ` (chmod 600 'DIR/writable'\''s')`},
		{"empty", "is empty; allowed: a file with the password alone"},
		{"lines", "holds a control character, such as a second line; allowed: one line of text"},
		{"large", "is larger than 4KiB; allowed: a file with the password alone"},
		{"none", "cannot be read: no such file or directory; " + allowed},
		{"link", "is a symbolic link; allowed: the path of the file itself"},
		{"pipe", "is a pipe; " + allowed},
		{".", "is a folder; " + allowed},
		{"/dev/null", "is no ordinary file; " + allowed},
	} {
		t.Run(strings.ReplaceAll(tt.file, "/", "_"), func(t *testing.T) {
			got := mistakes(t, filepath.Join(dir, "f.toml"), withPassword("password_file", tt.file), os.LookupEnv)
			want := tt.want
			if want != "" {
				want = "f.toml:6:17: outbound.password_file " + strings.ReplaceAll(want, "DIR", dir)
			}
			if got != want || strings.Contains(got, "hunter") {
				t.Errorf("got  %s\nwant %s", got, want)
			}
		})
	}
}

// A variable must be there when the file is checked. What stands in the place
// of its name, maybe the password, is not repeated.
func TestPasswordVariables(t *testing.T) {
	env := func(name string) (string, bool) {
		value, ok := map[string]string{"GOOD": "hunter2", "EMPTY": "", "LINES": "hunter2\nhunter3"}[name]
		return value, ok
	}
	for _, tt := range []struct {
		name, want string
		env        config.Env
	}{
		{"GOOD", "", env},
		{"EMPTY", "names a variable that is empty; allowed: one that holds the password", env},
		{"LINES", "holds a control character, such as a second line; allowed: one line of text", env},
		{"hunter2", "names a variable that is not in the environment; allowed: the name of one that is, without $", env},
		{"ANY", "", nil}, // somebody else's environment
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := mistakes(t, filepath.Join(t.TempDir(), "f.toml"), withPassword("password_env", tt.name), tt.env)
			want := tt.want
			if want != "" {
				want = "f.toml:6:16: outbound.password_env " + want
			}
			if got != want {
				t.Errorf("got  %s\nwant %s", got, want)
			}
		})
	}
}

// Read, which clients use, needs neither.
func TestReadLeavesPasswordsAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f.toml")
	if err := os.WriteFile(path, []byte(withPassword("password_file", "none")), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := config.Read(path); err != nil {
		t.Error(err)
	}
}
