package cgroupsel

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A killed instance can leave a process stopped: below Linux 6.13, and if it
// was killed together with the machine's means to notice. There is no file that
// says so; it is recognised by what no job control and no debugger leaves
// behind: stopped by SIGSTOP, not traced, on its way out of execve(2) or
// socket(2). Somebody's `kill -STOP` finds a process there by chance alone.

// adopt takes over the selected tasks that a killed instance left stopped:
// they are held again, and go on with those of their namespace.
func (d *spaces) adopt() error {
	tasks, err := d.tasks()
	if err != nil {
		return err
	}
	for _, r := range tasks {
		if !leftStopped(int(r.PID)) {
			continue
		}
		d.s.log.Info("a process was left stopped by a killed cgtun and goes on now", "pid", r.PID)
		// Those in home, too, are let go by watch: the dead one's was another.
		if err := d.m.held.Put(r.PID, stopped{Cookie: r.Cookie, Since: now()}); err != nil {
			return fmt.Errorf("adopt stopped process %d: %w", r.PID, err)
		}
	}
	return nil
}

// Release continues the processes in selected cgroups that a killed instance
// left stopped, and returns them. No instance may be live that selects these
// cgroups.
func Release(selections ...Selection) ([]int, error) {
	pick, err := newPicker(Options{Selections: selections})
	if err != nil {
		return nil, fmt.Errorf("look for stopped processes: %w", err)
	}
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, fmt.Errorf("look for stopped processes: %w", err)
	}
	var released []int
	var errs []error
	for _, file := range stats {
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		cgroup, err := CgroupOf(pid)
		if err != nil || strings.HasPrefix(cgroup, "/..") || pick.find(cgroup).selection == none {
			continue
		}
		ok, err := release(pid)
		if ok {
			released = append(released, pid)
		}
		errs = append(errs, err)
	}
	return released, errors.Join(errs...)
}

// release continues a process that was left stopped. It looks after it has a
// descriptor of it.
func release(pid int) (bool, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("continue process %d: %w", pid, err)
	}
	defer unix.Close(fd)
	if !leftStopped(pid) {
		return false, nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGCONT, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return false, fmt.Errorf("continue process %d: %w", pid, err)
	}
	return true, nil
}

// leftStopped tells whether a process is stopped as a hold stops: for a thread
// that opened a socket, by any of its threads.
func leftStopped(pid int) bool {
	if !stoppedBySIGSTOP(pid) {
		return false
	}
	calls, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/[0-9]*/syscall", pid))
	if err != nil {
		return false
	}
	for _, file := range calls {
		text, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		nr, _, _ := strings.Cut(string(text), " ")
		switch nr {
		case strconv.Itoa(unix.SYS_EXECVE), strconv.Itoa(unix.SYS_EXECVEAT), strconv.Itoa(unix.SYS_SOCKET):
			return true
		}
	}
	return false
}

// stoppedBySIGSTOP reads proc_pid_stat(5): the state, and the exit code, which
// for a stopped process is the signal that stopped it.
func stoppedBySIGSTOP(pid int) bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	// The name in parentheses may hold anything.
	end := strings.LastIndexByte(string(text), ')')
	fields := strings.Fields(string(text[end+1:]))
	const stateField, exitCode = 0, 52 - 3
	return len(fields) > exitCode && fields[stateField] == "T" && fields[exitCode] == strconv.Itoa(int(unix.SIGSTOP))
}
