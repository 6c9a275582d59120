package flow_test

import (
	"strings"
	"testing"

	"cgtun/flow"
)

// What a file calls a name is compared with what programs ask for, or is no name.
func TestPlainNames(t *testing.T) {
	const no = ""
	for _, tt := range []struct{ text, name, suffix string }{
		{"example.org", "example.org", "example.org"},
		{"Example.ORG.", "example.org", "example.org"},
		{"b\u00fccher.test", "xn--bcher-kva.test", "xn--bcher-kva.test"},
		{"_sip.a-b.test", "_sip.a-b.test", "_sip.a-b.test"},
		{"*.example.org", no, "example.org"},
		{".example.org", no, "example.org"},
		{"a.*.org", no, no},
		{"a..org", no, no},
		{"a b", no, no},
		{"a/b", no, no},
		{"", no, no},
		{".", no, no},
		{strings.Repeat("a", 64) + ".org", no, no},
		{strings.Repeat("a.", 128), no, no},
	} {
		if got, err := flow.PlainName(tt.text); got != tt.name || (err != nil) != (tt.name == no) {
			t.Errorf("name %q: %q, %v; want %q", tt.text, got, err, tt.name)
		}
		if got, err := flow.PlainSuffix(tt.text); got != tt.suffix || (err != nil) != (tt.suffix == no) {
			t.Errorf("suffix %q: %q, %v; want %q", tt.text, got, err, tt.suffix)
		}
	}
}
