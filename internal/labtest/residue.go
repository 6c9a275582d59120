package labtest

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"strings"
)

// Protocol is the route protocol number that marks cgtun's ip rules and routes.
const Protocol = 197

// residue lists what a cgtun has left in a namespace: enter is the command that
// goes into it, empty for the test's own.
func residue(enter ...string) (left []string) {
	in := func(args ...string) string {
		// Without nft nobody here has looked at a table either.
		if _, err := exec.LookPath(args[0]); err != nil {
			return ""
		}
		full := append(append([]string{}, enter...), args...)
		out, err := output(full[0], full[1:]...)
		if err != nil {
			left = append(left, "cannot look: "+err.Error())
		}
		return out
	}
	for line := range strings.Lines(in("nft", "list", "tables")) {
		if strings.Contains(line, " cgtun_") {
			left = append(left, "nft "+strings.TrimSpace(line))
		}
	}
	proto := fmt.Sprintf("proto %d", Protocol)
	for _, family := range []string{"-4", "-6"} {
		for line := range strings.Lines(in("ip", family, "rule", "show")) {
			if strings.Contains(line, proto) {
				left = append(left, "ip rule "+strings.TrimSpace(line))
			}
		}
		for line := range strings.Lines(in("ip", family, "route", "show", "table", "all")) {
			if strings.Contains(line, proto) {
				left = append(left, "route "+strings.TrimSpace(line))
			}
		}
	}
	var links []struct {
		Name string `json:"ifname"`
		Info struct {
			Kind string `json:"info_kind"`
		} `json:"linkinfo"`
	}
	text := in("ip", "-d", "-j", "link", "show")
	if err := json.Unmarshal([]byte(text), &links); err != nil && text != "" {
		left = append(left, "cannot look at links: "+err.Error())
	}
	for _, l := range links {
		if l.Info.Kind == "tun" {
			left = append(left, "device "+l.Name)
		}
	}
	return left
}
