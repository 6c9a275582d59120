package dialer

import (
	"crypto/x509"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"reflect"
	"strconv"
	"strings"
)

// Config is one [[outbound]]. Interface, Source, Mark and MPTCP are for
// TypeDirect, the keys from Server on for the others.
type Config struct {
	Name         string     `toml:"name"`
	Type         string     `toml:"type"`
	Interface    string     `toml:"interface"` // leave by it, through its own gateway
	Source       netip.Addr `toml:"source"`    // own address to leave from; zero: the kernel's choice
	Mark         uint32     `toml:"mark"`      // fwmark of the outbound's own packets; 0: none
	MPTCP        bool       `toml:"mptcp"`
	Server       string     `toml:"server"` // HOST:PORT
	Username     string     `toml:"username"`
	Password     Secret     `toml:"password"`
	PasswordFile string     `toml:"password_file"` // read into Password by config
	PasswordEnv  string     `toml:"password_env"`  // likewise
	TLSCA        string     `toml:"tls_ca"`        // PEM file beside the system's roots
	RemoteDNS    bool       `toml:"remote_dns"`    // the proxy gets the name that the client looked up
	Via          string     `toml:"via"`           // the outbound through which Server is reached

	roots *x509.CertPool // those of TLSCA and of the system; nil: of the system alone
}

// Equal says whether two outbounds of these configurations are the same.
func (c *Config) Equal(o *Config) bool {
	a, b := *c, *o
	roots := a.roots == b.roots || a.roots != nil && b.roots != nil && a.roots.Equal(b.roots)
	a.roots, b.roots = nil, nil
	return roots && reflect.DeepEqual(a, b)
}

// The values of type.
const (
	TypeDirect = "direct"
	TypeSOCKS5 = "socks5"
	TypeHTTP   = "http"
	TypeHTTPS  = "https"
)

// DefaultConfig returns an outbound as an empty table makes it: name and type
// must be written.
func DefaultConfig() Config { return Config{} }

// Secret is text that must not be shown: every way to print it gives ***.
// Reveal returns it. The zero value is no secret.
type Secret struct {
	// A pointer, so that fmt, which reads unexported fields of a struct
	// that holds a Secret, finds an address.
	text *string
}

const hidden = "***"

// NewSecret makes a Secret of text.
func NewSecret(text string) Secret { return Secret{text: &text} }

// Reveal returns the text, "" if there is none.
func (s Secret) Reveal() string {
	if s.text == nil {
		return ""
	}
	return *s.text
}

// IsZero tells whether there is no secret.
func (s Secret) IsZero() bool { return s.text == nil }

// UnmarshalText takes any text.
func (s *Secret) UnmarshalText(text []byte) error {
	*s = NewSecret(string(text))
	return nil
}

// String returns ***, as do the methods below, each in its form.
func (s Secret) String() string { return hidden }

// GoString is for %#v.
func (s Secret) GoString() string { return hidden }

// LogValue is for log/slog.
func (s Secret) LogValue() slog.Value { return slog.StringValue(hidden) }

// MarshalText is for encoders of text.
func (s Secret) MarshalText() ([]byte, error) { return []byte(hidden), nil }

// MarshalJSON is for encoding/json.
func (s Secret) MarshalJSON() ([]byte, error) { return []byte(`"` + hidden + `"`), nil }

// Validate calls bad for every value that is out of range or does not go with
// the type, with the key as it stands in the table. Whether Via exists is not
// known here.
func (c *Config) Validate(bad func(key, what string)) {
	if c.Name == "" {
		bad("name", "is missing; allowed: any text that no other outbound or group has")
	}
	switch c.Type {
	case TypeDirect:
		c.validateDirect(bad)
	case TypeSOCKS5, TypeHTTP, TypeHTTPS:
		c.validateProxy(bad)
	case "":
		bad("type", `is missing; allowed: "direct", "socks5", "http", "https"`)
	default:
		bad("type", fmt.Sprintf(`is %q; allowed: "direct", "socks5", "http", "https"`, c.Type))
	}
}

func (c *Config) validateDirect(bad func(key, what string)) {
	for _, other := range []struct {
		key     string
		written bool
	}{
		{"server", c.Server != ""}, {"username", c.Username != ""}, {"password", !c.Password.IsZero()},
		{"password_file", c.PasswordFile != ""}, {"password_env", c.PasswordEnv != ""},
		{"tls_ca", c.TLSCA != ""}, {"remote_dns", c.RemoteDNS}, {"via", c.Via != ""},
	} {
		if other.written {
			bad(other.key, `does not go with type "direct"; allowed: interface, source, mark, mptcp`)
		}
	}
	if len(c.Interface) > 15 || strings.ContainsAny(c.Interface, "/ \t\n") {
		bad("interface", fmt.Sprintf("%q is not an interface name; allowed: up to 15 characters without space and slash", c.Interface))
	}
	if c.Source.IsValid() && (c.Source.IsUnspecified() || c.Source.IsMulticast()) {
		bad("source", fmt.Sprintf("%s is no address to send from; allowed: an address of this machine", c.Source))
	}
}

func (c *Config) validateProxy(bad func(key, what string)) {
	for _, other := range []struct {
		key     string
		written bool
	}{
		{"interface", c.Interface != ""}, {"source", c.Source.IsValid()}, {"mark", c.Mark != 0}, {"mptcp", c.MPTCP},
	} {
		if other.written {
			bad(other.key, fmt.Sprintf(`does not go with type %q; allowed: via with an outbound of type "direct" that has it`, c.Type))
		}
	}
	if what := badServer(c.Server); what != "" {
		bad("server", what)
	}
	if c.TLSCA != "" && c.Type != TypeHTTPS {
		bad("tls_ca", fmt.Sprintf(`does not go with type %q; allowed: with type "https"`, c.Type))
	}
	var passwords []string
	if !c.Password.IsZero() {
		passwords = append(passwords, "password")
	}
	if c.PasswordFile != "" {
		passwords = append(passwords, "password_file")
	}
	if c.PasswordEnv != "" {
		passwords = append(passwords, "password_env")
	}
	if len(passwords) > 1 {
		bad(passwords[1], fmt.Sprintf("is written beside %s; allowed: one of password, password_file, password_env", passwords[0]))
	}
	if len(passwords) > 0 && c.Username == "" {
		bad(passwords[0], "is written without username; allowed: both or none")
	}
	if what := badCredential(c.Type, c.Username); what != "" {
		bad("username", what)
	}
	if c.Type != TypeSOCKS5 && strings.Contains(c.Username, ":") {
		bad("username", fmt.Sprintf("holds a colon; allowed: text without one with type %q (RFC 7617)", c.Type))
	}
	if what := badCredential(c.Type, c.Password.Reveal()); what != "" {
		bad("password", what)
	}
}

// badServer says what is wrong with HOST:PORT, "" if nothing.
func badServer(server string) string {
	const allowed = `allowed: "HOST:PORT", such as "192.0.2.10:1080" or "[2001:db8::1]:1080"`
	if server == "" {
		return "is missing; " + allowed
	}
	shown := WithoutAccount(server)
	host, port, err := net.SplitHostPort(server)
	if err != nil || host == "" || strings.ContainsAny(host, "/@ ") {
		return fmt.Sprintf("%q is not a server; %s", shown, allowed)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return fmt.Sprintf("%q has no port from 1 to 65535; %s", shown, allowed)
	}
	return ""
}
