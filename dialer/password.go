package dialer

import (
	"fmt"
	"strings"
)

// SetPassword sets the password that PasswordFile or PasswordEnv stands for,
// or says, without it, what is wrong with it.
func (c *Config) SetPassword(text string) (what string) {
	if what = badCredential(c.Type, text); what == "" {
		c.Password = NewSecret(text)
	}
	return what
}

// Most that RFC 1929 §2 has room for.
const maxSOCKSCredential = 255

// badCredential says why a username or a password cannot be sent by a type,
// "" if it can. The text itself is not repeated.
func badCredential(kind, text string) string {
	switch {
	case strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r == 0x7f }):
		// RFC 7617 §2 forbids them; in a file they are a mistake of its writer.
		return "holds a control character, such as a second line; allowed: one line of text"
	case kind == TypeSOCKS5 && len(text) > maxSOCKSCredential:
		return fmt.Sprintf("holds %d bytes; allowed: %d at most with type %q", len(text), maxSOCKSCredential, kind)
	}
	return ""
}

// WithoutAccount returns a URL, or what was meant to be one, as it can be shown:
// what stands before an @ is left out.
func WithoutAccount(url string) string {
	at := strings.LastIndexByte(url, '@')
	if at < 0 {
		return url
	}
	scheme := ""
	if i := strings.Index(url[:at], "://"); i >= 0 {
		scheme = url[:i+3]
	}
	return scheme + hidden + url[at:]
}
