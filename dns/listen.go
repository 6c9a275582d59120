package dns

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"cgtun/dialer"
	"cgtun/flow"
)

// Listener answers the queries that processes of this namespace send to
// resolvers on its loopback, and on the networks that it is connected to, which
// never come out of a tun: the nft table gives them to the Listener's port. The
// address is as it was, if that is one of loopback.
//
// What is asked is any address of 127.0.0.0/8, so that the sockets are bound to
// the device and answer from the address that was asked. What is not to be
// answered goes on to the resolver that was meant.
type Listener struct {
	r          *Resolver
	attachment string
	origin     Origin
	packets    []*net.UDPConn // of IPv4, and of IPv6 where there is that
	streams    []*net.TCPListener
	port       uint16
}

// Origin says whom a client meant whose query was led to loopback.
type Origin func(proto flow.Proto, from, here netip.AddrPort) (netip.AddrPort, error)

// listenTries is how many ports are tried that are free for all sockets.
const listenTries = 16

// Listen opens the sockets in the namespace of the calling thread. Flows are
// those of the attachment. Without an origin clients are answered that have an
// address of loopback, and no others. Run closes the Listener, or Close.
func (r *Resolver) Listen(attachment string, origin Origin) (*Listener, error) {
	var err error
	for range listenTries {
		l := &Listener{r: r, attachment: attachment, origin: origin}
		if err = l.open(); err == nil {
			return l, nil
		}
		l.Close()
	}
	return nil, fmt.Errorf("listen for queries on loopback: %w", err)
}

func (l *Listener) open() error {
	for _, network := range []string{"4", "6"} {
		addr := map[string]string{"4": "0.0.0.0", "6": "::1"}[network]
		at := net.JoinHostPort(addr, fmt.Sprint(l.port))
		config := net.ListenConfig{Control: onLoopback}
		config.SetMultipathTCP(false)
		pc, err := config.ListenPacket(context.Background(), "udp"+network, at)
		if err != nil {
			if network == "6" && !errors.Is(err, unix.EADDRINUSE) {
				return nil // a kernel without IPv6
			}
			return err
		}
		l.packets = append(l.packets, pc.(*net.UDPConn))
		l.port = pc.LocalAddr().(*net.UDPAddr).AddrPort().Port()
		ln, err := config.Listen(context.Background(), "tcp"+network, net.JoinHostPort(addr, fmt.Sprint(l.port)))
		if err != nil {
			return err
		}
		l.streams = append(l.streams, ln.(*net.TCPListener))
	}
	return nil
}

// onLoopback lets a socket of IPv4 hear of nothing but lo, and say which of its
// addresses was asked (ip(7)). One of IPv6 is bound to ::1, which nobody else
// reaches; by lo alone it could not answer other addresses of this machine.
func onLoopback(network, _ string, c syscall.RawConn) error {
	if strings.HasSuffix(network, "6") {
		return nil
	}
	var failed error
	err := c.Control(func(fd uintptr) {
		failed = unix.BindToDevice(int(fd), "lo")
		if network == "udp4" {
			failed = errors.Join(failed, unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_PKTINFO, 1))
		}
	})
	return errors.Join(err, failed)
}

// Port is that of all sockets.
func (l *Listener) Port() uint16 { return l.port }

// Close closes the sockets.
func (l *Listener) Close() {
	for _, c := range l.packets {
		c.Close()
	}
	for _, c := range l.streams {
		c.Close()
	}
}

// Run answers until ctx ends, and closes the Listener. way says what the rules
// say of upstreams on behalf of a client.
func (l *Listener) Run(ctx context.Context, way func(context.Context, *flow.Flow) Way) error {
	defer context.AfterFunc(ctx, l.Close)()
	var all sync.WaitGroup
	defer all.Wait()
	defer l.Close()
	for _, c := range l.packets {
		all.Go(func() { l.servePackets(ctx, c, way) })
	}
	for _, ln := range l.streams {
		all.Go(func() { l.serveStreams(ctx, ln, way) })
	}
	<-ctx.Done()
	return nil
}

func (l *Listener) servePackets(ctx context.Context, c *net.UDPConn, way func(context.Context, *flow.Flow) Way) {
	var waiting sync.WaitGroup
	defer waiting.Wait()
	buf, oob := make([]byte, maxQuestion), make([]byte, 128)
	for {
		n, m, _, from, err := c.ReadMsgUDPAddrPort(buf, oob)
		switch {
		case ctx.Err() != nil || errors.Is(err, net.ErrClosed):
			return
		case err != nil:
			continue // an error of an earlier answer's
		}
		to := netip.IPv6Loopback()
		if from.Addr().Unmap().Is4() {
			to = askedAddr(oob[:m])
		}
		f := l.flow(flow.UDP, from, to)
		if f == nil {
			continue
		}
		from = f.Src
		reply := func(b []byte) {
			if b != nil {
				_, _, _ = c.WriteMsgUDPAddrPort(b, answerFrom(to), from)
			}
		}
		answer, wait, mine := l.r.take(f, anybody, buf[:n], l.way(ctx, f, way))
		switch {
		case !mine:
			msg := append([]byte(nil), buf[:n]...)
			wait = func(ctx context.Context, reply func([]byte)) {
				defer l.r.waiting.give(clientOf(f))
				l.passOn(ctx, f.Dst, msg, reply)
			}
			if !l.r.waiting.take(clientOf(f)) {
				l.r.counts.dropped.Add(1)
				continue
			}
		case wait == nil:
			reply(answer)
			continue
		}
		waiting.Go(func() { wait(ctx, reply) })
	}
}

// anybody of this namespace is whom names know the Listener's clients as: what
// they ask comes from another address than their flows, from loopback or that of
// another network.
var anybody = netip.IPv6Loopback()

// flow is what a client sends to the resolver that it means; nil: nobody knows
// which.
func (l *Listener) flow(proto flow.Proto, from netip.AddrPort, here netip.Addr) *flow.Flow {
	from, here = netip.AddrPortFrom(from.Addr().Unmap(), from.Port()), here.Unmap()
	to := netip.AddrPortFrom(here, port)
	if !from.Addr().IsLoopback() {
		if l.origin == nil {
			return nil
		}
		var err error
		if to, err = l.origin(proto, from, netip.AddrPortFrom(here, l.port)); err != nil {
			l.r.log.Debug("a query of nobody knows whom", "src", from, "err", err)
			return nil
		}
	} else if !here.IsLoopback() {
		return nil
	}
	return flow.New(proto, from, to, l.attachment)
}

// way is what the rules say on behalf of a client, who is looked up when that is
// asked, and not before: the reader does not wait for it. The resolver that was
// asked itself is reached as it is without us.
func (l *Listener) way(ctx context.Context, f *flow.Flow, rules func(context.Context, *flow.Flow) Way) Way {
	of := sync.OnceValue(func() Way { return rules(ctx, f) })
	return func(to netip.AddrPort, proto flow.Proto) (dialer.Outbound, error) {
		if to == f.Dst {
			return l.r.now.Load().outbounds[direct], nil
		}
		return of()(to, proto)
	}
}

// passOn brings one datagram to the resolver that was meant, and its answer back.
func (l *Listener) passOn(ctx context.Context, to netip.AddrPort, msg []byte, reply func([]byte)) {
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
	if err != nil {
		return
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	_ = c.SetDeadline(time.Now().Add(giveUp))
	if _, err := c.Write(msg); err != nil {
		return
	}
	buf := make([]byte, maxMessage)
	if n, err := c.Read(buf); err == nil {
		reply(buf[:n])
	}
}

// maxStreams bounds the connections at a time. One more takes the place of the
// oldest: a query is over in a moment.
const maxStreams = 256

func (l *Listener) serveStreams(ctx context.Context, ln *net.TCPListener, way func(context.Context, *flow.Flow) Way) {
	var serving sync.WaitGroup
	defer serving.Wait()
	var open streams
	for {
		c, err := ln.AcceptTCP()
		switch {
		case ctx.Err() != nil || errors.Is(err, net.ErrClosed):
			return
		case err != nil:
			time.Sleep(time.Second / 10) // out of descriptors
			continue
		}
		if oldest := open.add(c); oldest != nil {
			oldest.Close()
			l.r.counts.dropped.Add(1)
		}
		serving.Go(func() {
			defer open.remove(c)
			defer c.Close()
			f := l.flow(flow.TCP, c.RemoteAddr().(*net.TCPAddr).AddrPort(), c.LocalAddr().(*net.TCPAddr).AddrPort().Addr())
			if f == nil {
				return
			}
			if read, pass, _ := l.r.serve(ctx, f, anybody, c, l.way(ctx, f, way)); pass {
				l.splice(ctx, c, f.Dst, read)
			}
		})
	}
}

// streams are the connections that are open, the oldest first.
type streams struct {
	mu  sync.Mutex
	all []*net.TCPConn
}

// add takes one in, and out the one that is too many.
func (s *streams) add(c *net.TCPConn) (oldest *net.TCPConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.all) == maxStreams {
		oldest, s.all = s.all[0], slices.Delete(s.all, 0, 1)
	}
	s.all = append(s.all, c)
	return oldest
}

func (s *streams) remove(c *net.TCPConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all = slices.DeleteFunc(s.all, func(o *net.TCPConn) bool { return o == c })
}

// splice brings a connection to the resolver that was meant.
func (l *Listener) splice(ctx context.Context, c *net.TCPConn, to netip.AddrPort, read []byte) {
	var d net.Dialer
	there, err := d.DialContext(ctx, "tcp", to.String())
	if err != nil {
		_ = c.SetLinger(0)
		return
	}
	defer there.Close()
	defer context.AfterFunc(ctx, func() { there.Close(); c.Close() })()
	if _, err := there.Write(read); err != nil {
		return
	}
	var both sync.WaitGroup
	both.Go(func() { _, _ = io.Copy(there, c); _ = there.(*net.TCPConn).CloseWrite() })
	both.Go(func() { _, _ = io.Copy(c, there); _ = c.CloseWrite() })
	both.Wait()
}

// askedAddr is the address that a datagram was sent to.
func askedAddr(oob []byte) netip.Addr {
	all, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return netip.Addr{}
	}
	for _, m := range all {
		// struct in_pktinfo: the index, the local and the header's address.
		if m.Header.Level == unix.SOL_IP && m.Header.Type == unix.IP_PKTINFO && len(m.Data) >= unix.SizeofInet4Pktinfo {
			return netip.AddrFrom4([4]byte(m.Data[8:12]))
		}
	}
	return netip.Addr{}
}

// answerFrom makes a datagram leave from an address, of IPv4.
func answerFrom(a netip.Addr) []byte {
	if a.Is6() {
		return nil
	}
	return unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: a.As4()})
}
