// Command demo shows what cgtun does, with real programs against real servers:
// sudo make demo.
//
// It makes two network namespaces, "machine" and "internet", joined by one
// uplink, starts ./cgtun in the machine on the unchanged example configuration,
// and runs four programs, each of a kind that takes its proxy from another
// place, or from none. None is given a proxy. Each runs twice: inside the
// selected cgroup, by `cgtun run`, and outside of it. Of each run it says how
// many of the program's packets went into tun0 and how many left by the uplink,
// as counted in the machine's own firewall, and what `cgtun flows` knows. Then it
// builds with a docker daemon of its own, where it can have one.
//
// It owns all that it makes and takes it away again, also after an interrupt.
// It is called by the Makefile only, and imports nothing of cgtun: it uses the
// command as a user would.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

const (
	binary = "./cgtun"
	config = "config.toml.example"
	cgroup = "/cgtun" // the one that the example selects
	device = "tun0"
	uplink = "eth0"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	// The fetching program of the third kind is this one: see programs.go.
	if len(os.Args) == 3 && os.Args[1] == socksFetch {
		if err := fetch(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if err := demo(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "\ndemo:", err)
		os.Exit(1)
	}
}

// demo runs the whole show. It fails if anything went another way than cgtun
// promises, or if something is left at the end.
func demo(ctx context.Context) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("it makes network namespaces: run sudo make demo")
	}
	if _, err := run(ctx, binary, "status"); err == nil {
		return errors.New("a cgtun is running on this machine, and the example's control socket is its: stop it first")
	}
	before := machineState(ctx)
	err = show(ctx)
	// An interrupted demo looks as well.
	if diff := changed(before, machineState(context.WithoutCancel(ctx))); diff != "" {
		return errors.Join(err, fmt.Errorf("left on this machine:\n%s", diff))
	}
	if err == nil {
		fmt.Println("\nAll programs went the way they should, and nothing is left on this machine.")
	}
	return err
}

func show(ctx context.Context) (err error) {
	l := &lab{}
	defer func() { err = errors.Join(err, l.close()) }()
	if err := l.build(ctx); err != nil {
		return fmt.Errorf("build the lab: %w", err)
	}
	fmt.Print(drawing)
	daemon, err := l.startDaemon(ctx)
	if err != nil {
		return err
	}
	for i, p := range programs(l) {
		fmt.Printf("\n%d. %s\n   $ %s\n", i+1, p.kind, p.shown)
		if e := l.compare(ctx, p); e != nil {
			err = errors.Join(err, fmt.Errorf("%s: %w", p.name, e))
		}
	}
	if e := l.docker(ctx); e != nil {
		err = errors.Join(err, fmt.Errorf("docker build: %w", e))
	}
	took, e := daemon.stop()
	if e == nil {
		fmt.Printf("\ncgtun stopped %d ms after SIGTERM.\n", took.Milliseconds())
	}
	return errors.Join(err, e)
}

// startDaemon starts cgtun the way that is usual in a lab and waits until it
// says that it is ready.
func (l *lab) startDaemon(ctx context.Context) (*process, error) {
	fmt.Printf("$ ip netns exec %s %s -c %s\n", machine, binary, config)
	p, err := l.start("ip", "netns", "exec", l.machine, binary, "-c", config)
	if err != nil {
		return nil, err
	}
	err = until(ctx, 20*time.Second, func() error {
		for line := range strings.Lines(p.output()) {
			if strings.Contains(line, "msg=ready") {
				return nil
			}
		}
		if p.ended() {
			return fmt.Errorf("cgtun has ended: %s", p.output())
		}
		return errors.New("cgtun is not ready")
	})
	if err != nil {
		return nil, fmt.Errorf("%w; it says:\n%s", err, p.output())
	}
	for line := range strings.Lines(p.output()) {
		fmt.Print("  ", line)
	}
	return p, nil
}

// compare runs a program inside and outside of the cgroup and says which way
// its packets took.
func (l *lab) compare(ctx context.Context, p program) error {
	in, err := l.watch(ctx, p, true)
	if err != nil {
		return fmt.Errorf("inside: %w", err)
	}
	fmt.Printf("   inside %s: got %d bytes; packets of the program: %d into %s, %d out by the uplink\n", cgroup, in.got, in.tun, device, in.up)
	for _, f := range in.flows {
		fmt.Println("     cgtun flows:", f)
	}
	out, err := l.watch(ctx, p, false)
	if err != nil {
		return fmt.Errorf("outside: %w", err)
	}
	fmt.Printf("   outside:       got %d bytes; packets of the program: %d into %s, %d out by the uplink; cgtun flows: %d\n", out.got, out.tun, device, out.up, len(out.flows))
	if in.tun == 0 || in.up != 0 || !in.has(p.want) {
		return fmt.Errorf("inside the cgroup its packets should all have gone into %s, and a flow to %s be known", device, p.want)
	}
	if out.tun != 0 || out.up == 0 || len(out.flows) != 0 {
		return errors.New("outside the cgroup its packets should all have left by the uplink, and no flow be known")
	}
	if in.got != out.got {
		return fmt.Errorf("%d bytes inside, %d outside", in.got, out.got)
	}
	return nil
}

// run runs a program to its end and returns its stdout; the error holds the
// stderr.
func run(ctx context.Context, name string, args ...string) (string, error) {
	return runCommand(exec.CommandContext(ctx, name, args...))
}

func runCommand(cmd *exec.Cmd) (string, error) {
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.WaitDelay = time.Second
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("run %s: %w: %s", strings.Join(cmd.Args, " "), err, strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}

// until calls ready again and again until it returns nil, and returns its last
// error after the timeout.
func until(ctx context.Context, timeout time.Duration, ready func() error) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	for {
		err := ready()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(20 * time.Millisecond):
		}
	}
}
