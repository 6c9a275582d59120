package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"cgtun/flow"
)

const (
	// firstWithin is how long a client may take to say something: one that
	// waits for the server is not asking.
	firstWithin = time.Second
	// idleStream ends a connection without questions (RFC 7766 §6.2.3).
	idleStream = 30 * time.Second
	// maxPipelined bounds the questions of one connection at a time.
	maxPipelined = 32
	// maxQuestion is the longest message that can be a question to be answered.
	maxQuestion = 4096
)

// Serve answers the queries of a client's TCP connection until the client ends
// it, which it returns false for, with why if that was not in order. With pass, the
// client has sent something that is not to be answered: read has it, and what
// follows is to be brought to the server that the client meant. It does not close c.
func (r *Resolver) Serve(ctx context.Context, f *flow.Flow, c net.Conn, way Way) (read []byte, pass bool, err error) {
	return r.serve(ctx, f, f.Src.Addr().Unmap(), c, way)
}

// serve is Serve for a client that is known to names as by.
func (r *Resolver) serve(ctx context.Context, f *flow.Flow, by netip.Addr, c net.Conn, way Way) (read []byte, pass bool, err error) {
	s := &stream{r: r, f: f, by: by, c: c, way: way, room: make(chan struct{}, maxPipelined)}
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(flow.Past) })
	read, pass, err = s.serve(ctx)
	s.asked.Wait()
	stop()
	_ = c.SetDeadline(time.Time{})
	return read, pass, err
}

type stream struct {
	r     *Resolver
	f     *flow.Flow
	by    netip.Addr
	c     net.Conn
	way   Way
	room  chan struct{}
	asked sync.WaitGroup

	write  sync.Mutex
	broken atomic.Bool // an answer has not been written to its end
}

func (s *stream) serve(ctx context.Context) (read []byte, pass bool, err error) {
	patience := firstWithin
	for {
		if err := s.c.SetReadDeadline(time.Now().Add(patience)); err != nil {
			return nil, false, err
		}
		if err := s.over(ctx); err != nil { // who has said so may have woken nobody
			return nil, false, err
		}
		msg, err := s.next()
		silent := flow.IsDeadline(err)
		if err := s.over(ctx); err != nil {
			return nil, false, err
		}
		switch {
		case err == nil:
		case silent && patience == firstWithin, errors.Is(err, errNotOurs):
			return msg, true, nil // it waits for the server, or sends something else than questions
		case silent, err == io.EOF:
			return nil, false, nil
		default:
			return nil, false, err
		}
		patience = idleStream
		answer, wait, mine := s.r.take(s.f, s.by, msg[2:], s.way)
		if !mine {
			return msg, true, nil
		}
		s.answer(ctx, answer, wait)
	}
}

// over is why the connection is to end, if it is.
func (s *stream) over(ctx context.Context) error {
	if s.broken.Load() && ctx.Err() == nil {
		return os.ErrDeadlineExceeded // for answers to be taken
	}
	return ctx.Err()
}

// next reads a message with its length in front. Of one that cannot be a
// question it reads no more than it has to: errNotOurs.
func (s *stream) next() (msg []byte, err error) {
	var head [2 + headerSize]byte
	n, err := io.ReadFull(s.c, head[:])
	if err != nil {
		if n > 0 {
			err = errNotOurs
		}
		return head[:n], err
	}
	length := int(binary.BigEndian.Uint16(head[:]))
	flags := binary.BigEndian.Uint16(head[4:])
	if length < headerSize || length > maxQuestion || flags&(bitResponse|maskOpcode) != 0 || binary.BigEndian.Uint16(head[6:]) != 1 {
		return head[:], errNotOurs
	}
	msg = make([]byte, 2+length)
	n = copy(msg, head[:])
	more, err := io.ReadFull(s.c, msg[n:])
	if err != nil {
		return msg[:n+more], errNotOurs
	}
	return msg, nil
}

// answer writes an answer, when it is there.
func (s *stream) answer(ctx context.Context, answer []byte, wait func(context.Context, func([]byte))) {
	if wait == nil {
		s.say(ctx, answer)
		return
	}
	s.room <- struct{}{}
	s.asked.Go(func() {
		defer func() { <-s.room }()
		wait(ctx, func(answer []byte) { s.say(ctx, answer) })
	})
}

// say writes an answer. A client that does not take it gets no other one.
func (s *stream) say(ctx context.Context, answer []byte) {
	if answer == nil {
		return
	}
	s.write.Lock()
	defer s.write.Unlock()
	if err := s.c.SetWriteDeadline(time.Now().Add(giveUp)); err != nil || ctx.Err() != nil || s.broken.Load() {
		return
	}
	if err := writeMessage(s.c, answer); err != nil {
		s.broken.Store(true)
		_ = s.c.SetReadDeadline(flow.Past)
	}
}
