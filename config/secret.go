package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"cgtun/dialer"
)

// Env finds an environment variable, as os.LookupEnv does.
type Env func(name string) (value string, ok bool)

// maxSecret is the largest password file in bytes.
const maxSecret = 4 << 10

// authorities reads the certificates that outbounds believe.
func (r *report) authorities(folder string, outbounds []dialer.Config) {
	const allowed = "a readable file of certificates in PEM"
	for i := range outbounds {
		o := &outbounds[i]
		key := at("outbound", i) + ".tls_ca"
		if o.TLSCA == "" || r.isBroken(key) {
			continue
		}
		path := o.TLSCA
		if !filepath.IsAbs(path) {
			path = filepath.Join(folder, path)
		}
		pem, err := readFile(path, maxFile)
		if err != nil {
			r.bad(key, fmt.Sprintf("%.60q %v; allowed: %s", o.TLSCA, err, allowed))
		} else if what := o.SetCA(pem); what != "" {
			r.bad(key, fmt.Sprintf("%.60q %s", o.TLSCA, what))
		}
	}
}

// secrets puts passwords that stand elsewhere into the outbounds. What is
// reported shows neither a password nor what could be one by mistake, such as
// the value of a key for a name.
func (r *report) secrets(folder string, outbounds []dialer.Config, env Env) {
	for i := range outbounds {
		o := &outbounds[i]
		table := at("outbound", i)
		key, text, what := "", "", ""
		switch {
		case r.isBroken(table+".password") || !o.Password.IsZero():
			continue
		case o.PasswordFile != "" && !r.isBroken(table+".password_file"):
			key = ".password_file"
			text, what = secretFile(folder, o.PasswordFile)
		case o.PasswordEnv != "" && env != nil && !r.isBroken(table+".password_env"):
			key = ".password_env"
			text, what = secretVariable(o.PasswordEnv, env)
		default:
			continue
		}
		if what == "" {
			what = o.SetPassword(text)
		}
		if what != "" {
			r.bad(table+key, what)
		}
	}
}

func secretVariable(name string, env Env) (text, what string) {
	text, ok := env(name)
	switch {
	case !ok:
		return "", "names a variable that is not in the environment; allowed: the name of one that is, without $"
	case text == "":
		return "", "names a variable that is empty; allowed: one that holds the password"
	}
	return text, ""
}

// secretFile reads a password that nobody but its owner and root can read or
// change. What stands at the path is opened only if it is a file: no link is
// followed in the last place, and nothing is waited for.
func secretFile(folder, path string) (text, what string) {
	const allowed = "a file that only root or its owner can read"
	if !filepath.IsAbs(path) {
		path = filepath.Join(folder, path)
	}
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if errors.Is(err, unix.ELOOP) {
		return "", "is a symbolic link; allowed: the path of the file itself"
	}
	if err != nil {
		return "", fmt.Sprintf("cannot be read: %v; allowed: %s", cause(err), allowed)
	}
	defer file.Close()
	info, err := file.Stat()
	switch {
	case err != nil:
		return "", fmt.Sprintf("cannot be read: %v; allowed: %s", cause(err), allowed)
	case !info.Mode().IsRegular():
		return "", "is " + kind(info.Mode()) + "; allowed: " + allowed
	case info.Mode().Perm()&0o077 != 0:
		return "", fmt.Sprintf("has mode %04o, so that others can read or change it; allowed: %s (chmod 600 %s)",
			info.Mode().Perm(), allowed, quoteShell(path))
	}
	data, err := io.ReadAll(io.LimitReader(file, maxSecret+1))
	switch {
	case err != nil:
		return "", fmt.Sprintf("cannot be read: %v; allowed: %s", cause(err), allowed)
	case len(data) > maxSecret:
		return "", fmt.Sprintf("is larger than %s; allowed: a file with the password alone", Size(maxSecret))
	}
	data = bytes.TrimSuffix(bytes.TrimSuffix(data, []byte("\n")), []byte("\r"))
	if len(data) == 0 {
		return "", "is empty; allowed: a file with the password alone"
	}
	return string(data), ""
}

func kind(mode fs.FileMode) string {
	switch {
	case mode.IsDir():
		return "a folder"
	case mode&fs.ModeNamedPipe != 0:
		return "a pipe"
	}
	return "no ordinary file"
}

// quoteShell writes a path so that the line can be pasted into a shell.
func quoteShell(path string) string {
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("/._-+@:", r)
	}
	if strings.ContainsFunc(path, func(r rune) bool { return !strconv.IsPrint(r) }) {
		return strconv.Quote(path) // not for a shell, but harmless to read
	}
	if strings.ContainsFunc(path, func(r rune) bool { return !plain(r) }) {
		return "'" + strings.ReplaceAll(path, "'", `'\''`) + "'"
	}
	return path
}
