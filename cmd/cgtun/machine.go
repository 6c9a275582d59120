package main

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"cgtun/dialer"
	"cgtun/doctor"
)

// The oldest kernel that cgtun is made for.
const kernelMajor, kernelMinor = 5, 15

func checkKernel(context.Context) []doctor.Result {
	const name = "kernel"
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return one(name, doctor.Warn, "its version is not known: "+err.Error(), "uname -r")
	}
	release := unix.ByteSliceToString(u.Release[:])
	var major, minor int
	_, err := fmt.Sscanf(release, "%d.%d", &major, &minor)
	if err == nil && (major < kernelMajor || major == kernelMajor && minor < kernelMinor) {
		return one(name, doctor.Error, fmt.Sprintf("%s is older than %d.%d, which is needed", release, kernelMajor, kernelMinor),
			fmt.Sprintf("run a kernel since %d.%d", kernelMajor, kernelMinor))
	}
	return one(name, doctor.OK, release, "")
}

// checkNames looks for who resolves names in the place of the programs that want
// them: in another cgroup.
func checkNames(context.Context) []doctor.Result {
	const name = "names"
	conf, _ := os.ReadFile("/etc/nsswitch.conf")
	for line := range strings.Lines(string(conf)) {
		words := strings.Fields(line)
		if len(words) == 0 || words[0] != "hosts:" {
			continue
		}
		for _, w := range words[1:] {
			if w == "dns" {
				break
			}
			if w == "resolve" {
				return one(name, doctor.Warn, "programs have systemd-resolved ask for names (nss-resolve), in its own cgroup: those queries are not captured",
					`put "dns" before "resolve" in the line "hosts:" of /etc/nsswitch.conf`)
			}
		}
	}
	if _, err := os.Stat("/run/nscd/socket"); err == nil {
		return one(name, doctor.Warn, "programs have nscd ask for names, in its own cgroup: those queries are not captured", "systemctl disable --now nscd")
	}
	return one(name, doctor.OK, "programs ask for names themselves", "")
}

// checkPing tries what an outbound needs for pings.
func checkPing(context.Context) []doctor.Result {
	if err := dialer.EchoAllowed(); err != nil {
		return one("ping", doctor.Warn, "pings are refused: neither a ping socket nor a raw one can be opened: "+err.Error(),
			`sysctl -w net.ipv4.ping_group_range="0 2147483647"`)
	}
	return one("ping", doctor.OK, "can be sent", "")
}

// enoughFiles is the limit of open files from which on nothing is said: a flow
// takes one descriptor.
const enoughFiles = 65536

// limits looks at what bounds flows: descriptors, memory, connection tracking.
func (p *patient) limits(context.Context) []doctor.Result {
	return append(append(p.files(), p.memory()...), checkConntrack()...)
}

// files looks at the daemon's limit, or at the one that it would get from here.
func (p *patient) files() []doctor.Result {
	const name = "open files"
	var n uint64
	if p.status != nil {
		n = p.status.Limits.Nofile
	} else {
		var r unix.Rlimit
		if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
			return one(name, doctor.Warn, "the limit is not known: "+err.Error(), "ulimit -Hn")
		}
		n = r.Max
	}
	if n < enoughFiles {
		return one(name, doctor.Warn, fmt.Sprintf("at most %d, and a flow takes one: more flows at once are refused", n),
			"ulimit -Hn 1048576 before the start, or LimitNOFILE=1048576 in the unit")
	}
	return one(name, doctor.OK, fmt.Sprintf("at most %d", n), "")
}

// memory compares what is free with what cgtun may take. A daemon that runs
// has taken its share.
func (p *patient) memory() []doctor.Result {
	const name = "memory"
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil || p.status != nil {
		return nil
	}
	_, rest, _ := strings.Cut(string(text), "MemAvailable:")
	fields := strings.Fields(rest)
	if len(fields) == 0 {
		return nil
	}
	kib, err := strconv.ParseUint(fields[0], 10, 64)
	if err != nil {
		return nil
	}
	want := uint64(p.file.Limits.Memory)
	what := fmt.Sprintf("%s are available, [limits] memory is %s", size(kib<<10), size(want))
	if kib<<10 < want {
		return one(name, doctor.Warn, what+": the kernel may end cgtun before it refuses flows", "set a smaller memory in [limits]")
	}
	return one(name, doctor.OK, what, "")
}

// checkConntrack says whether the table of connections is nearly full: then the
// kernel drops new ones, captured or not. Without the module there is none.
func checkConntrack() []doctor.Result {
	const name = "connection tracking"
	const dir = "/proc/sys/net/netfilter/"
	count, err1 := readNumber(dir + "nf_conntrack_count")
	most, err2 := readNumber(dir + "nf_conntrack_max")
	if err1 != nil || err2 != nil || most == 0 {
		return nil
	}
	what := fmt.Sprintf("%d of %d connections", count, most)
	if count > most/10*9 {
		return one(name, doctor.Warn, what+": when it is full the kernel drops new ones", fmt.Sprintf("sysctl -w net.netfilter.nf_conntrack_max=%d", most*4))
	}
	return one(name, doctor.OK, what, "")
}

func readNumber(path string) (uint64, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
}
