package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"cgtun/config"
	"cgtun/dialer"
)

// Passwords that came by the environment stay readable in /proc/PID/environ:
// that is the memory that the kernel filled at exec, and to unset a variable
// does not change it. So the daemon reads the file, and if it names variables
// of its environment, puts their values into a sealed memfd and executes
// itself again without them. Arguments, pid, descriptors and the rest of the
// environment stay, so that systemd sees one start. The second process finds
// the memfd by handedOn, reads it once and closes it.

// handedOn is the variable with the number of the memfd's descriptor.
const handedOn = "CGTUN_HANDED_ON"

const allSeals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE

// hideMemory keeps the passwords that this process reads out of core dumps,
// also of those that a program collects, which no limit stops (core(5)), and
// from debuggers without CAP_SYS_PTRACE. It lasts until exec.
func hideMemory() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("keep passwords out of core dumps: %w", err)
	}
	return nil
}

// environment is that of the process, and what was handed on.
type environment struct{ handed map[string]dialer.Secret }

// takeOver reads what handOn left, if anything. It is called once.
func takeOver() (environment, error) {
	number, ok := os.LookupEnv(handedOn)
	if !ok {
		return environment{}, nil
	}
	fd, err := strconv.Atoi(number)
	if err != nil || fd <= 2 {
		return environment{}, fmt.Errorf("%s is %.20q, which cgtun did not set; unset it", handedOn, number)
	}
	// Somebody else's descriptor is neither read nor closed.
	if seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0); err != nil || seals&allSeals != allSeals {
		return environment{}, fmt.Errorf("%s names a descriptor that cgtun did not hand on; unset it", handedOn)
	}
	file := os.NewFile(uintptr(fd), "memfd")
	defer file.Close()
	data, err := io.ReadAll(io.NewSectionReader(file, 0, 1<<30))
	if err != nil {
		return environment{}, fmt.Errorf("read what was handed on: %w", err)
	}
	e := environment{handed: map[string]dialer.Secret{}}
	for _, line := range strings.Split(string(data), "\x00") {
		if name, value, ok := strings.Cut(line, "="); ok {
			e.handed[name] = dialer.NewSecret(value)
		}
	}
	return e, os.Unsetenv(handedOn)
}

// lookup is a config.Env.
func (e environment) lookup(name string) (string, bool) {
	if s, ok := e.handed[name]; ok {
		return s.Reveal(), true
	}
	return os.LookupEnv(name)
}

// handOn executes this program again if the environment holds a password that
// the file names. It returns only if there is none, or with an error.
func (e environment) handOn(file *config.File) error {
	var names []string
	for _, o := range file.Outbounds {
		if o.PasswordEnv != "" {
			names = append(names, o.PasswordEnv)
		}
	}
	named := func(line string) bool {
		name, _, _ := strings.Cut(line, "=")
		return slices.Contains(names, name)
	}
	env := os.Environ()
	if !slices.ContainsFunc(env, named) {
		return nil
	}
	var secret []byte
	for _, line := range env {
		if named(line) {
			secret = append(append(secret, line...), 0)
		}
	}
	for name, s := range e.handed {
		secret = append(append(secret, name+"="+s.Reveal()...), 0)
	}
	fd, err := sealed(secret)
	if err != nil {
		return fmt.Errorf("hand passwords on: %w", err)
	}
	env = append(slices.DeleteFunc(env, named), handedOn+"="+strconv.Itoa(fd))
	err = unix.Exec(ownProgram(), os.Args, env)
	return fmt.Errorf("hand passwords on: execute cgtun again: %w", errors.Join(err, unix.Close(fd)))
}

// sealed returns a descriptor that outlives exec, of a file in memory that
// nobody can change.
func sealed(data []byte) (fd int, err error) {
	const flags = unix.MFD_ALLOW_SEALING
	fd, err = unix.MemfdCreate("cgtun", flags|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) { // before 6.3
		fd, err = unix.MemfdCreate("cgtun", flags)
	}
	if err != nil {
		return -1, os.NewSyscallError("memfd_create", err)
	}
	for len(data) > 0 && err == nil {
		var n int
		n, err = unix.Write(fd, data)
		data = data[max(n, 0):]
	}
	if err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, allSeals)
	}
	if err != nil {
		return -1, errors.Join(err, unix.Close(fd))
	}
	return fd, nil
}

// ownProgram is a path of what this process runs: by its name, which ps and
// pgrep show, if that still leads to it.
func ownProgram() string {
	const self = "/proc/self/exe"
	path, err := os.Readlink(self)
	if err != nil || !filepath.IsAbs(path) {
		return self
	}
	var now, named unix.Stat_t
	if unix.Stat(self, &now) != nil || unix.Stat(path, &named) != nil || now.Dev != named.Dev || now.Ino != named.Ino {
		return self
	}
	return path
}

// exposed says that others can change the file, or read the password that it
// holds itself, and what mends that; "" if not. A password_file in that state is
// refused; this is for what stands beside everything else in a file that was there
// before.
func exposed(file *config.File) (what, fix string) {
	info, err := os.Stat(file.Name)
	if err != nil || !info.Mode().IsRegular() {
		return "", ""
	}
	mode := info.Mode().Perm()
	holds := slices.ContainsFunc(file.Outbounds, func(o dialer.Config) bool {
		return !o.Password.IsZero() && o.PasswordFile == "" && o.PasswordEnv == ""
	})
	switch {
	case mode&0o002 != 0:
		return fmt.Sprintf("%s has mode %04o: others can change what cgtun does", file.Name, mode), "chmod o-w " + file.Name
	case holds && mode&0o044 != 0:
		return fmt.Sprintf("%s holds a password and has mode %04o: others can read it", file.Name, mode),
			"chmod 600 " + file.Name + ", or password_file in place of password"
	}
	return "", ""
}
