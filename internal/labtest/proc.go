package labtest

import (
	"context"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Proc is a program that runs in the background. The lab kills it at its end.
type Proc struct {
	Pid int

	t    testing.TB
	name string
	cmd  *exec.Cmd
	out  lockedBuilder
	done chan struct{} // closed when err is set
	err  error
}

// lockedBuilder collects the output while the program runs.
type lockedBuilder struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lockedBuilder) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuilder) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// Start runs a program in the background inside the namespace.
func (h *Host) Start(name string, args ...string) *Proc {
	h.lab.t.Helper()
	return h.lab.StartCommand(h.Command(context.Background(), name, args...))
}

// StartCommand runs cmd in the background, in a process group of its own. Its
// Stdout and Stderr, where not set, are collected for Output.
func (l *Lab) StartCommand(cmd *exec.Cmd) *Proc {
	l.t.Helper()
	p := &Proc{t: l.t, name: strings.Join(cmd.Args, " "), cmd: cmd, done: make(chan struct{})}
	if cmd.Stdout == nil {
		cmd.Stdout = &p.out
	}
	if cmd.Stderr == nil {
		cmd.Stderr = &p.out
	}
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = !cmd.SysProcAttr.Setsid
	// A grandchild that keeps the pipe open must not keep Wait.
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		l.t.Fatalf("start %s: %v", p.name, err)
	}
	p.Pid = cmd.Process.Pid
	go func() {
		defer close(p.done)
		p.err = cmd.Wait()
	}()
	l.onClose(p.end)
	return p
}

// end kills the process group and, for a test that failed, shows what the
// program said.
func (p *Proc) end() {
	select {
	case <-p.done:
	default:
		_ = syscall.Kill(-p.Pid, syscall.SIGKILL)
		<-p.done
	}
	if p.t.Failed() && p.out.String() != "" {
		p.t.Logf("output of %s:\n%s", p.name, p.out.String())
	}
}

// Output returns what the program wrote so far, stdout and stderr.
func (p *Proc) Output() string { return p.out.String() }

// Wait waits for the end of the program and returns what exec.Cmd.Wait did.
func (p *Proc) Wait() error {
	<-p.done
	return p.err
}

// Exited tells whether the program has ended.
func (p *Proc) Exited() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// Signal sends a signal to the program alone.
func (p *Proc) Signal(sig syscall.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil {
		p.t.Fatalf("signal %s: %v", p.name, err)
	}
}

// Stop sends SIGTERM and waits for the end, ten seconds at most. It returns
// how long it took and what Wait does.
func (p *Proc) Stop() (time.Duration, error) {
	p.t.Helper()
	start := time.Now()
	p.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(10 * time.Second):
		p.t.Fatalf("%s lives 10 s after SIGTERM", p.name)
	}
	return time.Since(start), p.err
}

// WaitOutput waits until the output holds text. It fails the test after the
// timeout, and when the program ends without having said it.
func (p *Proc) WaitOutput(text string, timeout time.Duration) {
	p.t.Helper()
	ended := false
	ok := eventually(timeout, func() bool {
		ended = p.Exited()
		return strings.Contains(p.Output(), text) || ended
	})
	if ended && strings.Contains(p.Output(), text) {
		return
	}
	if ended {
		p.t.Fatalf("%s ended without saying %q (%v)", p.name, text, p.Wait())
	}
	if !ok {
		p.t.Fatalf("%s did not say %q within %v", p.name, text, timeout)
	}
}
