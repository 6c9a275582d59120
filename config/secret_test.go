package config_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/BurntSushi/toml"

	"cgtun/config"
	"cgtun/dialer"
)

// A password is not found in anything that is printed, however it is printed.
func TestPasswordsAreNotShown(t *testing.T) {
	const password = "hunter2"
	outbound := dialer.Config{Name: "a", Password: dialer.NewSecret(password)}
	held := struct {
		hidden dialer.Secret // not exported: fmt looks into it without asking its methods
		list   []dialer.Config
	}{outbound.Password, []dialer.Config{outbound}}

	var out bytes.Buffer
	for _, format := range []string{"%v\n", "%+v\n", "%#v\n", "%s\n", "%q\n", "%x\n", "%d\n"} {
		fmt.Fprintf(&out, format, outbound.Password)
		fmt.Fprintf(&out, format, outbound)
		fmt.Fprintf(&out, format, &outbound)
		fmt.Fprintf(&out, format, held)
	}
	asJSON, err := json.Marshal(outbound)
	if err != nil {
		t.Fatal(err)
	}
	out.Write(asJSON)
	if err := toml.NewEncoder(&out).Encode(outbound); err != nil {
		t.Fatal(err)
	}
	slog.New(slog.NewTextHandler(&out, nil)).Info("x", "outbound", outbound, "password", outbound.Password)
	slog.New(slog.NewJSONHandler(&out, nil)).Info("x", "outbound", outbound, "password", outbound.Password)
	for _, leak := range []string{password, fmt.Sprintf("%x", password), "104 117 110 116"} {
		if strings.Contains(strings.ToLower(out.String()), leak) {
			t.Errorf("%s is shown:\n%s", leak, out.String())
		}
	}
	if !strings.Contains(out.String(), "***") || outbound.Password.Reveal() != password {
		t.Error("nothing stands in its place, or it is lost")
	}
}

// Nor is one that stands in a file with a mistake.
func TestPasswordsAreNotInErrors(t *testing.T) {
	for _, line := range []string{
		"password = hunter2",
		"password = 'hunter2",
		`password = "hunter2`,
		`password = "\hunter2"`,
		"password = [hunter2]",
		"password = ['hunter2']",
		"password = {a = 'hunter2'}",
		"password = {hunter2 = 1}",
		"password = 'hunter2' 'hunter2'",
		"password.x = 'hunter2'",
		"pasword = 'hunter2'",
		"password = 'hunter2'\npassword = 'hunter2'",
		"via = 'x'\n[[outbound]]\nname = 'b'\ntype = 'http'\nserver = 'http://u:hunter2@192.0.2.1:3128'",
		"via = 'x'\n[[outbound]]\nname = 'b'\ntype = 'http'\nserver = 'u:hunter2@192.0.2.1'",
		"[dns]\nupstreams = 'https://u:hunter2@dns.example/dns-query'",
		"[[group]]\nname = 'g'\noutbounds = 'a'\nprobe.url = 'ftp://u:hunter2@x.example/'",
	} {
		_, err := config.Parse("f", []byte("[[outbound]]\nname = 'a'\ntype = 'http'\nserver = '192.0.2.1:3128'\nusername = 'u'\n"+line+"\n"))
		if err == nil || strings.Contains(err.Error(), "hunter") {
			t.Errorf("%s: %v", line, err)
		}
	}
}
