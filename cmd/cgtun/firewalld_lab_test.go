package main_test

import (
	"context"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"cgtun/attach"
	"cgtun/internal/labtest"
)

// firewalld is Debian's, in a machine of the lab. It is unpacked, not installed: who
// installs it has it started at the next boot. It sees a bus of its own, and nobody on
// it, and the files of this machine with its own over them.
type firewalld struct {
	w   *world
	bus *labtest.Proc
	*labtest.Proc
}

func (w *world) firewalld() *firewalld {
	w.t.Helper()
	dir := w.t.TempDir()
	fetch := `apt-get -qq -o APT::Sandbox::User=root download firewalld python3-firewall python3-nftables python3-cap-ng libnm0 gir1.2-nm-1.0
		mkdir root; for deb in *.deb; do dpkg-deb -x $deb root; done
		mkdir -p usr etc work1 work2; cp root/usr/share/dbus-1/system.d/FirewallD.conf .`
	cmd := exec.Command("sh", "-ec", fetch)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		w.t.Fatalf("fetch firewalld: %v: %s", err, out)
	}
	over := `cd "$0"; mount --make-rprivate /
		mount -t overlay -o lowerdir=root/usr:/usr,upperdir=usr,workdir=work1 none /usr
		mount -t overlay -o lowerdir=root/etc:/etc,upperdir=etc,workdir=work2 none /etc
		cp FirewallD.conf /etc/dbus-1/system.d/; rm -f /usr/share/dbus-1/system-services/*
		mount -t tmpfs none /run; mkdir /run/dbus
		exec dbus-daemon --system --nofork --nopidfile --print-address`
	f := &firewalld{w: w, bus: w.lab.StartCommand(w.machine.Command(context.Background(), "unshare", "-m", "sh", "-ec", over, dir))}
	f.bus.WaitOutput("unix:path=", patience())
	return f
}

// start starts it and waits until its rules are there.
func (f *firewalld) start() {
	f.w.t.Helper()
	bus := strconv.Itoa(f.bus.Pid)
	f.Proc = f.w.lab.StartCommand(f.w.machine.Command(context.Background(), "nsenter", "-t", bus, "-m", "/usr/sbin/firewalld", "--nofork", "--nopid"))
	f.settled()
}

// settled waits until its rules are there and change no more.
func (f *firewalld) settled() {
	f.w.t.Helper()
	before := ""
	labtest.Eventually(f.w.t, patience(), func() bool {
		now := f.w.machine.Run("nft", "-s", "list", "ruleset")
		same := now == before
		before = now
		time.Sleep(300 * time.Millisecond)
		return same && strings.Contains(now, "goto filter_IN_public")
	}, "firewalld has loaded its rules: %s", f.Output())
}

// reload is what systemctl reload does.
func (f *firewalld) reload() {
	f.w.t.Helper()
	f.Signal(syscall.SIGHUP)
	time.Sleep(100 * time.Millisecond) // it flushes a little later
	f.settled()
}

func (f *firewalld) stop() {
	f.w.t.Helper()
	f.Signal(syscall.SIGTERM)
	_ = f.Wait()
	if out := f.w.machine.Run("nft", "list", "tables"); strings.Contains(out, "firewalld") {
		f.w.t.Errorf("firewalld has stopped and left\n%s", out)
	}
}

// firewalld starts, reloads and stops under a cgtun that runs, or has ended: what is
// selected goes by cgtun alone, or as on_exit says, and others as before.
func TestFirewalld(t *testing.T) {
	if !labtest.Soak() {
		return // it comes from Debian's archive
	}
	for _, exit := range []string{"open", "closed"} {
		t.Run(exit, func(t *testing.T) { firewalldWith(t, exit) })
	}
}

func firewalldWith(t *testing.T, exit string) {
	labtest.Alone(t)
	w := newWorld(t, "apt-get", "dpkg-deb")
	w.routed()
	w.server.ServeEcho(":7000")
	w.server.ServeUDPEcho(port(far4, 7000))
	w.server.ServeUDPEcho(port(far6, 7000))
	text := strings.Replace(w.config(second), "[route]", "[route]\non_exit = \""+exit+"\"", 1)
	f := w.firewalld()
	p := w.wait() // a namespace of its own, beyond the firewall
	w.join(1, p.pid)

	const answered, refused = 10 * time.Second, time.Second // for how long it is waited where that is expected
	dial := func(at where, wait time.Duration, network, far string, in ...string) bool {
		args := append(in, append([]string{"env"}, probeArgs(probe{Do: "dial", Network: network, To: port(far, 7000), Say: "x", Wait: wait})...)...)
		out, err := w.try(at, args[0], args[1:]...)
		return err == nil && strings.Contains(out, `"Heard":"x"`)
	}
	there := []string{"nsenter", "-t", strconv.Itoa(p.pid), "-n"}
	everyWay := func(do func(network, far string)) {
		for _, network := range []string{"tcp", "udp"} {
			for _, far := range []string{far4, far6} {
				do(network, far)
			}
		}
	}
	captured := func(when string) {
		t.Helper()
		everyWay(func(network, far string) {
			if !dial(inside, answered, network, far) {
				t.Errorf("%s: %s to %s is not carried", when, network, far)
			}
			if !dial(inside, answered, network, far, there...) {
				t.Errorf("%s: %s to %s is not carried from a namespace", when, network, far)
			}
		})
		w.noLeak(when)
	}
	ended := func(when string) {
		t.Helper()
		wait := map[string]time.Duration{"open": answered, "closed": refused}[exit]
		everyWay(func(network, far string) {
			if got := dial(inside, wait, network, far); got != (exit == "open") {
				t.Errorf("%s: %s to %s gets out: %v", when, network, far, got)
			}
			if !dial(outside, answered, network, far) {
				t.Errorf("%s: who is not selected does not get %s to %s", when, network, far)
			}
		})
		if exit == "closed" {
			w.leaks.Reset() // of who is not selected
			for _, network := range []string{"tcp", "udp"} {
				dial(inside, refused, network, far4, there...)
				dial(inside, refused, network, far6, there...)
			}
			w.noLeak(when)
		}
		w.leaks.Reset()
	}
	stream := func() *labtest.Proc {
		return w.lab.StartCommand(w.command(context.Background(), inside, "env", probeArgs(probe{Do: "stream", To: port(far4, 7000)})...))
	}

	d := w.start(text)
	labtest.Eventually(t, patience(), func() bool { return w.stateOf(p.pid) == attach.StateUp }, "the namespace is attached")
	sender := stream()
	f.start()
	captured("firewalld has started")
	for range 3 {
		f.reload()
		captured("firewalld has reloaded")
	}
	w.machine.Run("nft", "flush", "ruleset")
	w.machine.Run("ip", "rule", "del", "pref", "10101")
	w.machine.Run("ip", "-6", "rule", "del", "pref", "10101")
	began := time.Now()
	labtest.Eventually(t, patience(), func() bool {
		return strings.Contains(w.machine.Run("ip", "rule")+w.machine.Run("ip", "-6", "rule"), strconv.Itoa(w.number))
	}, "the rules are back")
	t.Logf("flushed, and ip rules deleted: back after %v", time.Since(began))
	captured("flushed, firewalld's rules too: it does not come back from that by a reload")
	f.stop()
	captured("firewalld has stopped")
	f.start()
	d.kill()
	if exit == "closed" {
		w.noLeak("cgtun was killed")
	}
	sender.Signal(syscall.SIGKILL)
	_ = sender.Wait()
	ended("cgtun was killed")
	f.reload()
	ended("cgtun was killed, firewalld has reloaded")
	f.stop()
	ended("cgtun was killed, firewalld has stopped")
	f.start()
	ended("cgtun was killed, firewalld has started")
	d = w.start(text)
	labtest.Eventually(t, patience(), func() bool { return w.stateOf(p.pid) == attach.StateUp }, "the namespace is attached again")
	w.leaks.Reset()
	captured("cgtun has started again")
	d.stop()
	ended("cgtun has stopped")
	f.reload()
	ended("cgtun has stopped, firewalld has reloaded")
	if _, errs, code := w.cgtun("cleanup"); code != 0 {
		t.Errorf("cleanup: %d %s", code, errs)
	}
	if !dial(inside, answered, "tcp", far4) || !dial(inside, answered, "udp", far6) {
		t.Error("after cleanup who was selected does not get out")
	}
	f.stop()
}
