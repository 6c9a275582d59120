package control

import (
	"fmt"
	"net/netip"
	"path"
	"strings"
)

// Config is the [control] table: where the daemon can be asked.
type Config struct {
	Socket  string `toml:"socket"`  // absolute path of the control socket
	Metrics string `toml:"metrics"` // ADDRESS:PORT that serves /metrics; "": nowhere
}

// DefaultSocket is where a daemon is found that nobody gave another socket.
const DefaultSocket = "/run/cgtun/cgtun.sock"

// DefaultConfig returns the settings of an empty file.
func DefaultConfig() Config { return Config{Socket: DefaultSocket} }

// maxSocket is the longest path that fits an address of unix(7), with its NUL.
const maxSocket = 107

// Validate calls bad for every value that is out of range, with the key as it
// stands in the table.
func (c *Config) Validate(bad func(key, what string)) {
	if !path.IsAbs(c.Socket) || strings.HasSuffix(c.Socket, "/") || len(c.Socket) > maxSocket {
		bad("socket", fmt.Sprintf("%q is not the path of a socket; allowed: an absolute path of at most %d bytes", c.Socket, maxSocket))
	}
	if c.Metrics == "" {
		return
	}
	if at, err := netip.ParseAddrPort(c.Metrics); err != nil || at.Port() == 0 {
		bad("metrics", fmt.Sprintf(`%q is not an address with a port; allowed: such as "127.0.0.1:9101", or ""`, c.Metrics))
	}
}
