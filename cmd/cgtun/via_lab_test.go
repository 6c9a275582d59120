package main_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"cgtun/internal/labtest"
)

// Programs as people use them by each way of the kernel, three at once in one cgtun,
// each with its own selection, mark and table: a router, a machine behind a device,
// which stands for a VM, and somebody else's transparent proxy.
//
//	machine ──── eth1 ──────────────────── eth1 router ──── server
//	        ──── eth2 ─── vm (10.70.0.2) ─ eth3        (ss-server)
//	        ss-redir ──── eth0 ─────────── eth0
func TestRealProgramsByWaysOfTheKernel(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "curl", "wget", "git", "dig", "dnsmasq", "nginx", "ss-redir", "ss-server")
	w.serveFiles()
	w.serveNames()
	vm := w.lab.Host("vm")
	to := w.lab.Link(w.machine, vm, "10.70.0.1/24", "10.70.0.2/24", "fd70::1/64", "fd70::2/64")
	on := w.lab.Link(vm, w.router, "10.71.0.2/24", "10.71.0.1/24", "fd71::2/64", "fd71::1/64")
	vm.Forward()
	// By a device alone the machine asks for everybody there: the VM answers for them.
	vm.Sysctl("net.ipv4.conf."+to.B+".proxy_arp", "1")
	vm.Sysctl("net.ipv6.conf."+to.B+".proxy_ndp", "1")
	vm.Run("ip", "neigh", "add", "proxy", far6, "dev", to.B)
	vm.Run("ip", "route", "add", "default", "via", "10.71.0.1")
	vm.Run("ip", "route", "add", "default", "via", "fd71::1")
	w.router.Run("ip", "route", "add", "10.70.0.0/24", "via", "10.71.0.2")
	w.router.Run("ip", "route", "add", "fd70::/64", "via", "fd71::2")
	config := filepath.Join(w.dir, "ss.json")
	text := fmt.Sprintf(`{"server":%q,"server_port":8388,"local_address":"127.0.0.1","local_port":12345,"password":"lab","method":"aes-256-gcm","timeout":60}`, near4)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	w.router.Start("ss-server", "-s", near4, "-p", "8388", "-k", "lab", "-m", "aes-256-gcm", "-u")
	w.machine.Start("ss-redir", "-c", config, "-u", "-T")
	for h, port := range map[*labtest.Host]string{w.router: ":8388", w.machine: ":12345"} {
		for _, network := range []string{"tcp", "udp"} {
			labtest.Eventually(t, patience(), func() bool { return strings.Contains(h.Run("ss", "-ln", "--"+network), port) }, "the proxy listens")
		}
	}
	meter := func(device, source string) *labtest.Meter {
		return w.router.MeterMatch(fmt.Sprintf(`iifname %q %s`, device, source))
	}
	ways := []struct {
		name, via string
		cgroup    *labtest.Cgroup
		by        *labtest.Meter // what came this way
		fars      []string
	}{
		{"router", `{gateway = "10.2.0.1", gateway6 = "fd02::1", dev = "eth1"}`, w.sel, meter("eth1", "meta l4proto { tcp, udp }"), []string{far4, far6}},
		{"vm", fmt.Sprintf("{dev = %q}", to.A), w.lab.Cgroup("vm"), meter(on.B, "meta l4proto { tcp, udp }"), []string{far4, far6}},
		{"proxy", `{tproxy = "127.0.0.1:12345"}`, w.lab.Cgroup("proxy"), meter("eth0", "th dport 8388"), []string{far4}},
	}
	routes := ""
	for i, way := range ways {
		number := w.number + i*100_000_000
		routes += fmt.Sprintf("[[route]]\nname = %q\nmark = %d\ntable = %d\npriority = %d\nvia = %s\n[route.select]\ncgroups = [%q]\n", way.name, number, number, 10101+i, way.via, way.cgroup.Path)
	}
	w.start(fmt.Sprintf("%s[control]\nsocket = %q\n[log]\nlevel = \"debug\"\n", routes, w.socket))
	programs := []struct{ name, script, want string }{
		{"curl", "curl -sSf http://$U/file | sha256sum", w.sum()},
		{"wget", "wget -qO- http://$U/file | sha256sum", w.sum()},
		{"git", "rm -rf clone && git clone -q http://$U/repo.git clone && git -C clone log --format=%s", "first"},
		{"dig", "dig +short +tries=1 +time=3 @$A name.example", "192.0.2.77"},
		{"dig over TCP", "dig +tcp +short +tries=1 +time=3 @$A name.example", "192.0.2.77"},
	}
	run := func(c *labtest.Cgroup, script, far string) string {
		url := far
		if strings.Contains(far, ":") {
			url = "[" + far + "]"
		}
		script = fmt.Sprintf("cd %s && A=%s U=%s && %s", w.dir, far, url, script)
		args := []string{"-u", "http_proxy", "-u", "https_proxy", "timeout", "30", "sh", "-c", script}
		cmd := w.machine.Command(t.Context(), "env", args...)
		if c != nil {
			cmd = c.In(t.Context(), w.machine, "env", args...)
		}
		out, err := cmd.CombinedOutput()
		return fmt.Sprintf("%s(%v)", out, err)
	}
	count := func() (all [3]uint64) {
		for i, way := range ways {
			all[i] = way.by.Packets()
		}
		return all
	}
	for i, way := range ways {
		for _, far := range way.fars {
			for _, p := range programs {
				before := count()
				if out := run(way.cgroup, p.script, far); !strings.Contains(out, p.want) {
					t.Errorf("%s by the %s to %s: %s, want %s", p.name, way.name, far, out, p.want)
				}
				for j, now := range count() {
					if (now != before[j]) != (i == j) {
						t.Errorf("%s by the %s to %s: %d packets by the %s", p.name, way.name, far, now-before[j], ways[j].name)
					}
				}
			}
		}
	}
	w.noLeak("by ways of the kernel")
	before := count()
	if out := run(nil, programs[0].script, far4); !strings.Contains(out, w.sum()) || w.leaks.Packets() == 0 {
		t.Errorf("who is not selected: %s", out)
	}
	if now := count(); now != before {
		t.Errorf("who is not selected has gone by %v, was %v", now, before)
	}
}
