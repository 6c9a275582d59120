package attach_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// holding asks for a socket in the holder's process: its type and family, what
// it connects or else sends to, and the device that it is bound to.
type holding struct {
	Name        string
	Type        int
	Family      int
	Connect, To netip.AddrPort // v4 addresses may be asked of a v6 socket
	Device      string
}

// hold opens the sockets that JSON in the environment asks for, prints their
// local ports, and keeps them until its stdin ends. No connect waits for its
// answer.
func hold() error {
	var wanted []holding
	if err := json.Unmarshal([]byte(os.Getenv(holderEnv)), &wanted); err != nil {
		return err
	}
	var ports []int
	for _, h := range wanted {
		port, err := h.open()
		if err != nil {
			return fmt.Errorf("%s: %w", h.Name, err)
		}
		ports = append(ports, port)
	}
	if err := json.NewEncoder(os.Stdout).Encode(ports); err != nil {
		return err
	}
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}

func (h *holding) open() (port int, err error) {
	fd, err := unix.Socket(h.Family, h.Type|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	if h.Device != "" {
		if err := unix.BindToDevice(fd, h.Device); err != nil {
			return 0, err
		}
	}
	if h.Connect.IsValid() {
		if err := unix.Connect(fd, h.address(h.Connect)); err != nil && !errors.Is(err, unix.EINPROGRESS) {
			return 0, err
		}
	} else if err := unix.Sendto(fd, []byte("x"), 0, h.address(h.To)); err != nil {
		return 0, err
	}
	local, err := unix.Getsockname(fd)
	switch l := local.(type) {
	case *unix.SockaddrInet4:
		port = l.Port
	case *unix.SockaddrInet6:
		port = l.Port
	}
	return port, err
}

func (h *holding) address(a netip.AddrPort) unix.Sockaddr {
	if h.Family == unix.AF_INET {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

// closed returns the local end of a connection to a listener at addr that was
// closed while the other end was not.
func closed(addr string) (src, dst netip.AddrPort, end func(), err error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return src, dst, nil, err
	}
	defer l.Close()
	client, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		return src, dst, nil, err
	}
	server, err := l.Accept()
	if err != nil {
		return src, dst, nil, errors.Join(err, client.Close())
	}
	src, dst = client.LocalAddr().(*net.TCPAddr).AddrPort(), l.Addr().(*net.TCPAddr).AddrPort()
	return src, dst, func() { server.Close() }, client.Close()
}
