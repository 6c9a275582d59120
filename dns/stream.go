package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
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

// past is the deadline of what is to end now.
var past = time.Unix(1, 0)

// Serve answers the queries of a client's TCP connection until the client ends
// it, which it returns false for. With pass, the client has sent something
// that is not to be answered: read has it, and what follows is to be brought to
// the server that the client meant. It does not close c.
func (r *Resolver) Serve(ctx context.Context, f *flow.Flow, c net.Conn, way Way) (read []byte, pass bool) {
	s := &stream{r: r, f: f, c: c, way: way, room: make(chan struct{}, maxPipelined)}
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(past) })
	read, pass = s.serve(ctx)
	s.asked.Wait()
	stop()
	_ = c.SetDeadline(time.Time{})
	return read, pass
}

type stream struct {
	r     *Resolver
	f     *flow.Flow
	c     net.Conn
	way   Way
	room  chan struct{}
	asked sync.WaitGroup

	write  sync.Mutex
	broken atomic.Bool // an answer has not been written to its end
}

func (s *stream) serve(ctx context.Context) (read []byte, pass bool) {
	patience := firstWithin
	for {
		if err := s.c.SetReadDeadline(time.Now().Add(patience)); err != nil || ctx.Err() != nil || s.broken.Load() {
			return nil, false
		}
		msg, err := s.next()
		switch {
		case ctx.Err() != nil || s.broken.Load():
			return nil, false
		case err == nil:
		case patience == firstWithin && !errors.Is(err, io.EOF):
			return msg, true // silent, or something else than a question
		case errors.Is(err, errNotOurs):
			return msg, true
		default:
			return nil, false
		}
		patience = idleStream
		answer, wait, mine := s.r.Take(s.f, msg[2:], s.way)
		if !mine {
			return msg, true
		}
		s.answer(ctx, answer, wait)
	}
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
		_ = s.c.SetReadDeadline(past)
	}
}
