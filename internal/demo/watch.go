package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"sort"
	"strings"
	"time"
)

// flow is what the demo shows of a flow in `cgtun flows --json`.
type flow struct {
	ID      uint64   `json:"id"`
	Proto   string   `json:"proto"`
	Src     string   `json:"src"`
	Dst     string   `json:"dst"`
	Cgroup  string   `json:"cgroup"`
	Process string   `json:"process"`
	Rule    *int     `json:"rule"`
	Use     string   `json:"use"`
	Path    []string `json:"path"`
	State   string   `json:"state"`
	Up      uint64   `json:"up_bytes"`
	Down    uint64   `json:"down_bytes"`
}

// String shows a flow in one line.
func (f flow) String() string {
	rule := "no rule"
	if f.Rule != nil {
		rule = fmt.Sprintf("rule %d", *f.Rule)
	}
	process := ""
	if f.Process != "" {
		process = ", process " + f.Process
	}
	return fmt.Sprintf("%s %s → %s, cgroup %s%s, %s, use %s, path %s, up %d, down %d, %s",
		f.Proto, f.Src, f.Dst, f.Cgroup, process, rule, f.Use, strings.Join(f.Path, " → "), f.Up, f.Down, f.State)
}

// seen is what one run of a program did.
type seen struct {
	got     int // bytes on its stdout
	tun, up int // packets
	flows   []flow
}

func (s seen) has(dst string) bool {
	return slices.ContainsFunc(s.flows, func(f flow) bool { return strings.HasSuffix(f.Dst, dst) && f.Cgroup == cgroup })
}

// watch runs a program, inside of the cgroup or not, and looks at the counters
// and at the flows before and after.
func (l *lab) watch(ctx context.Context, p program, inside bool) (seen, error) {
	known, err := l.flows(ctx)
	if err != nil {
		return seen{}, err
	}
	tun, up, err := l.packets(ctx)
	if err != nil {
		return seen{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	args := []string{"netns", "exec", l.machine}
	if inside {
		args = append(args, binary, "-c", config, "run", "--")
	}
	args = append(args, "setpriv", "--regid", group, "--clear-groups", "--")
	cmd := exec.CommandContext(ctx, "ip", append(args, p.args...)...)
	cmd.Env = environment(p.env)
	cmd.Stdin = strings.NewReader(p.stdin)
	out, err := runCommand(cmd)
	if err != nil {
		return seen{}, err
	}
	s := seen{got: len(out)}
	s.tun, s.up, err = l.packets(ctx)
	if err != nil {
		return seen{}, err
	}
	s.tun, s.up = s.tun-tun, s.up-up
	s.flows, err = l.flows(ctx)
	s.flows = slices.DeleteFunc(s.flows, func(f flow) bool {
		return slices.ContainsFunc(known, func(k flow) bool { return k.ID == f.ID })
	})
	return s, err
}

func (l *lab) packets(ctx context.Context) (tun, up int, err error) {
	if tun, err = l.counter(ctx, "tun"); err != nil {
		return 0, 0, err
	}
	up, err = l.counter(ctx, "uplink")
	return tun, up, err
}

// flows asks cgtun for its flows, those that have just ended too.
func (l *lab) flows(ctx context.Context) ([]flow, error) {
	out, err := run(ctx, binary, "-c", config, "flows", "--json")
	if err != nil {
		return nil, err
	}
	var answer struct {
		Flows []flow `json:"flows"`
	}
	if err := json.Unmarshal([]byte(out), &answer); err != nil {
		return nil, fmt.Errorf("read cgtun flows: %w", err)
	}
	sort.Slice(answer.Flows, func(i, j int) bool { return answer.Flows[i].ID < answer.Flows[j].ID })
	return answer.Flows, nil
}

// expiry matches what changes by itself in a line about an address or a route.
var expiry = regexp.MustCompile(`(valid_lft|preferred_lft|expires) \S+`)

// machineState lists, a line each, what a demo could leave on the machine. Of
// the namespaces it lists the demo's own: others come and go.
func machineState(ctx context.Context) (lines []string) {
	for _, cmd := range []string{"ip netns list", "ip -o link", "ip -o addr", "ip rule", "ip -6 rule", "ip route show table all", "ip -6 route show table all", "nft list tables"} {
		args := strings.Fields(cmd)
		out, err := run(ctx, args[0], args[1:]...)
		if err != nil {
			out = err.Error()
		}
		for line := range strings.Lines(out) {
			if cmd != "ip netns list" || strings.Contains(line, fmt.Sprint("-", os.Getpid())) {
				lines = append(lines, cmd+": "+strings.TrimSpace(expiry.ReplaceAllString(line, "")))
			}
		}
	}
	for _, pattern := range []string{"/etc/netns/*", "/run/cgtun/*", "/sys/fs/cgroup/cgtun*", "/sys/fs/cgroup/unified/cgtun*", filepath.Join(os.TempDir(), "cgtun-demo*")} {
		found, _ := filepath.Glob(pattern)
		lines = append(lines, found...)
	}
	return lines
}

// changed returns the lines that only one of the states has.
func changed(before, after []string) string {
	var b strings.Builder
	for _, line := range before {
		if !slices.Contains(after, line) {
			fmt.Fprintln(&b, "-", line)
		}
	}
	for _, line := range after {
		if !slices.Contains(before, line) {
			fmt.Fprintln(&b, "+", line)
		}
	}
	return b.String()
}
