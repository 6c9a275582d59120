// Package stack turns the packets of an attachment into flows: a gVisor netstack
// behind the queues of a tun, with UDP and ICMP taken in front of it.
//
// It owns the netstack, the connections of its clients and the sessions of its
// datagram sources. It does not own the device: who opened it closes it after
// Run has returned. It knows nothing of outbounds: each flow goes to a
// flow.Handler (router). attach runs one Stack per attachment.
//
// What is done where:
//
//	stack.go      Options, New, Run
//	link.go       packets out of netstack, with their offloads
//	reader.go     packets in: what is let in, what is counted and turned away
//	fragments.go  TCP in fragments, until its sum is right
//	ring.go       what large segments are read into
//	tcp.go        a SYN becomes a flow.Stream: held until the outbound is there
//	early.go      SYNs and RSTs that come before netstack can take them
//	pending.go    the table of SYNs that are held, its bounds, who gave up
//	conn.go       an answered client as a flow.Conn
//	buffers.go    how much all of them may hold together
//	direct.go     the same for relay, without a copy and without a goroutine
//	udp*.go       datagrams (RFC 768, RFC 4787)
//	echo.go       ICMP echo: sessions of the same kind as UDP's
//	icmp.go       ICMP errors (RFC 792, RFC 4443)
//	probes.go     what errors from the path quote
//
// TCP is RFC 9293 as netstack has it, with SACK (RFC 2018), window scaling and
// timestamps (RFC 7323).
package stack
