package attach_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"cgtun/attach"
	"cgtun/internal/labtest"
	"cgtun/steer"
	"cgtun/tun"
)

// homeEnv names the test whose body the test binary is to run.
const homeEnv = "CGTUN_ATTACH_HOME"

// atHome runs body in a process that was started in a namespace of a lab, for
// home is where a process was started:
//
//	home eth0 (10.9.0.1, fd09::1) ──── next (10.9.0.2, fd09::2)
//
// Afterwards the namespace must be as it was before. What body changes there
// it changes back.
func atHome(t *testing.T, body func(t *testing.T)) {
	t.Helper()
	atHomeBy(t, nil, body)
}

// atHomeBy is atHome with words before the command, such as those of setpriv(1).
func atHomeBy(t *testing.T, words []string, body func(t *testing.T)) {
	t.Helper()
	if os.Getenv(homeEnv) == t.Name() {
		body(t)
		return
	}
	labtest.Need(t, labtest.Root, labtest.Tool("ip"), labtest.Tool("nft"))
	lab := labtest.New(t)
	home, next := lab.Host("home"), lab.Host("next")
	lab.Link(home, next, "10.9.0.1/24", "10.9.0.2/24", "fd09::1/64", "fd09::2/64")
	home.Run("ip", "route", "add", "default", "via", "10.9.0.2")
	home.Run("ip", "route", "add", "default", "via", "fd09::2")
	before := lab.Snapshot(home)

	words = append(words, os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=2m")
	cmd := home.Command(context.Background(), words[0], words[1:]...)
	cmd.Env = append(os.Environ(), homeEnv+"="+t.Name())
	p := lab.StartCommand(cmd)
	if err := p.Wait(); err != nil || !strings.Contains(p.Output(), "--- PASS: "+t.Name()) {
		t.Errorf("in its home: %v", err) // the lab shows the output
	}
	if diff := before.Diff(lab.Snapshot(home)); diff != "" {
		t.Errorf("home is not as it was:\n%s", diff)
	}
}

func options() attach.Options {
	return attach.Options{
		Routes: []attach.Route{{
			Name: "default", Instance: "101",
			Tun:  tun.Options{Name: "tun0", Table: 101},
			Plan: steer.Plan{Mark: 101, Mask: 0xffffffff, Table: 101, Priority: 10101},
		}},
		Serve: serveNothing,
	}
}

// otherRoute is a second one for options.
func otherRoute() attach.Route {
	return attach.Route{
		Name: "other", Instance: "102",
		Tun:  tun.Options{Name: "tun1", Table: 102},
		Plan: steer.Plan{Mark: 102, Mask: 0xffffffff, Table: 102, Priority: 10102},
	}
}

// serveNothing is a netstack that lets the packets lie.
func serveNothing(ctx context.Context, _ *attach.Attachment) error {
	<-ctx.Done()
	return nil
}

// running is a Manager whose Run is under way.
type running struct {
	*attach.Manager
	t      *testing.T
	cancel context.CancelFunc
	ended  chan error
}

// run starts a Manager and waits until it is ready.
func run(t *testing.T, o attach.Options) *running {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	r := &running{Manager: attach.New(o), t: t, cancel: cancel, ended: make(chan error, 1)}
	ready := make(chan struct{})
	go func() { r.ended <- r.Run(ctx, func() { close(ready) }) }()
	select {
	case <-ready:
	case err := <-r.ended:
		cancel()
		t.Fatalf("Run ended before it was ready: %v", err)
	}
	return r
}

// stop ends Run and returns its error.
func (r *running) stop() error {
	r.t.Helper()
	r.cancel()
	return r.end()
}

// home is the state of home's attachment.
func (r *running) home() attach.State { return r.States()[0] }

// end waits for Run to return, also on a busy machine.
func (r *running) end() error {
	r.t.Helper()
	defer r.cancel()
	select {
	case err := <-r.ended:
		return err
	case <-time.After(10 * time.Second):
		r.t.Fatal("Run has not returned within 10 s")
		return nil
	}
}

// ip runs ip(8) at home.
func ip(t *testing.T, args string) string {
	t.Helper()
	out, err := tool("ip", args)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func tool(name, args string) (string, error) {
	out, err := exec.Command(name, strings.Fields(args)...).CombinedOutput()
	if err != nil {
		err = errors.Join(err, errors.New(name+" "+args+": "+string(out)))
	}
	return string(out), err
}

// steered says what of the steering and its device is there.
func steered() (parts string) {
	for _, p := range []struct{ name, tool, args, text string }{
		{"device", "ip", "link show up", "tun0"},
		{"rule", "ip", "-4 rule", "fwmark 0x65 lookup 101"},
		{"rule6", "ip", "-6 rule", "fwmark 0x65 lookup 101"},
		{"route", "ip", "-4 route show table 101", "default dev tun0"},
		{"route6", "ip", "-6 route show table 101", "default dev tun0"},
		{"nft", "nft", "list tables", "inet cgtun_101"},
	} {
		if out, err := tool(p.tool, p.args); err == nil && strings.Contains(out, p.text) {
			parts += p.name + " "
		}
	}
	return strings.TrimSpace(parts)
}

const all = "device rule rule6 route route6 nft"

func ruleset(t *testing.T) string {
	t.Helper()
	out, err := tool("nft", "list table inet cgtun_101")
	if err != nil {
		t.Error(err)
	}
	return out
}
