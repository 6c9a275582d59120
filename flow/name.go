package flow

import (
	"errors"
	"strings"

	"golang.org/x/net/idna"
)

var errName = errors.New("is not a name")

// PlainName returns the name of a host as flows have it: in lower case, as it is
// asked for in the DNS (RFC 5891), without a dot at the end.
func PlainName(text string) (string, error) {
	name := strings.TrimSuffix(text, ".")
	if !isASCII(name) {
		var err error
		if name, err = idna.Lookup.ToASCII(name); err != nil {
			return "", errName
		}
	}
	name = strings.ToLower(name)
	const longest, longestLabel = 253, 63
	if name == "" || len(name) > longest {
		return "", errName
	}
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > longestLabel {
			return "", errName
		}
		for i := range len(label) {
			if c := label[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '_' {
				return "", errName
			}
		}
	}
	return name, nil
}

// PlainSuffix is PlainName of a name that stands for all below it too. A dot in
// front of it, or "*.", says so once more, and is taken off.
func PlainSuffix(text string) (string, error) {
	return PlainName(strings.TrimPrefix(strings.TrimPrefix(text, "*"), "."))
}

func isASCII(s string) bool {
	for i := range len(s) {
		if s[i] >= 0x80 {
			return false
		}
	}
	return true
}
