package tun

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"cgtun/internal/netns"

	"golang.org/x/sys/unix"
)

// maxSlices bounds the pieces of one packet, header not counted: a 64 KiB
// segment of pages, its packet header, and room.
const maxSlices = 62

// Queue is one queue of a Device. ReadPacket may be called beside WritePacket,
// but not beside itself; WritePacket by anybody.
type Queue struct {
	file *os.File
	raw  syscall.RawConn

	// State of the one reader, kept here so that a read allocates nothing.
	header [headerLen]byte
	iov    [maxSlices + 1]unix.Iovec
	iovLen int
	n      int
	errno  syscall.Errno
	readFn func(fd uintptr) bool

	writers sync.Pool // of *writer

	letGo atomic.Bool // its end is that of the namespace
}

// newQueue takes over fd, a non-blocking descriptor that is attached already.
func newQueue(fd int, name string) (*Queue, error) {
	f := os.NewFile(uintptr(fd), "/dev/net/tun:"+name)
	raw, err := f.SyscallConn()
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("open tun %s: %w", name, err)
	}
	q := &Queue{file: f, raw: raw}
	q.readFn = q.readv
	q.writers.New = func() any {
		w := new(writer)
		w.fn = w.writev
		return w
	}
	return q, nil
}

// ReadPacket waits for one packet and scatters it over bufs, in order. It
// returns how many bytes the packet has; a packet longer than bufs is an error.
// After Close it returns os.ErrClosed, after the end of the device's namespace
// netns.ErrGone. Other errors concern that one packet.
func (q *Queue) ReadPacket(bufs [][]byte) (Offload, int, error) {
	q.iov[0] = iovec(q.header[:])
	q.iovLen = 1
	room := 0
	for _, b := range bufs[:min(len(bufs), maxSlices)] {
		q.iov[q.iovLen] = iovec(b)
		q.iovLen++
		room += len(b)
	}
	if err := q.raw.Read(q.readFn); err != nil {
		if q.letGo.Load() || q.gone() {
			return Offload{}, 0, packetError("read", unix.EBADFD)
		}
		return Offload{}, 0, fmt.Errorf("read packet: %w", closed(err))
	}
	if q.errno != 0 {
		return Offload{}, 0, packetError("read", q.errno)
	}
	if q.n < headerLen {
		return Offload{}, 0, fmt.Errorf("read packet: only %d bytes", q.n)
	}
	var o Offload
	if err := o.parse(q.header[:]); err != nil {
		return Offload{}, 0, err
	}
	n := q.n - headerLen
	if n > room {
		return Offload{}, 0, fmt.Errorf("read packet: %d bytes do not fit %d", n, room)
	}
	return o, n, nil
}

// gone says whether the device was deleted. If nobody waited for a packet at
// that time, the runtime's poller only knows of some error.
func (q *Queue) gone() bool {
	ifr, err := unix.NewIfreq("")
	if err != nil {
		return false
	}
	ctlErr := q.raw.Control(func(fd uintptr) { err = unix.IoctlIfreq(int(fd), unix.TUNGETIFF, ifr) })
	return ctlErr == nil && errors.Is(err, unix.EBADFD)
}

// netns opens a descriptor of the namespace that the device is in, which says so
// itself (TUNGETDEVNETNS): EBADFD when it has gone.
func (q *Queue) netns() (ns int, err error) {
	errControl := q.raw.Control(func(fd uintptr) {
		r, _, errno := syscall.Syscall(unix.SYS_IOCTL, fd, unix.TUNGETDEVNETNS, 0)
		if ns = int(r); errno != 0 {
			err = errno
		}
	})
	return ns, errors.Join(errControl, err)
}

func (q *Queue) readv(fd uintptr) bool {
	n, _, errno := syscall.Syscall(unix.SYS_READV, fd, uintptr(unsafe.Pointer(&q.iov[0])), uintptr(q.iovLen))
	q.n, q.errno = int(n), errno
	return errno != unix.EAGAIN && errno != unix.EINTR
}

// writer is the state of one WritePacket. It is pooled because what goes
// through a RawConn escapes: a writer a packet would be garbage at packet rate.
type writer struct {
	header [headerLen]byte
	iov    [maxSlices + 1]unix.Iovec
	iovLen int
	errno  syscall.Errno
	fn     func(fd uintptr)
}

func (w *writer) writev(fd uintptr) {
	for {
		_, _, errno := syscall.Syscall(unix.SYS_WRITEV, fd, uintptr(unsafe.Pointer(&w.iov[0])), uintptr(w.iovLen))
		w.errno = errno
		if errno != unix.EINTR {
			return
		}
	}
}

// WritePacket sends one packet, whose bytes are those of slices in order, to
// the device's namespace. It does not wait and does not keep the slices. A
// packet that the kernel has no room for is lost, as on any link.
func (q *Queue) WritePacket(o Offload, slices [][]byte) error {
	if len(slices) > maxSlices {
		return q.WritePacket(o, [][]byte{join(slices)})
	}
	w := q.writers.Get().(*writer)
	defer q.writers.Put(w)
	o.put(w.header[:])
	w.iov[0] = iovec(w.header[:])
	w.iovLen = 1
	for _, b := range slices {
		if len(b) == 0 {
			continue
		}
		w.iov[w.iovLen] = iovec(b)
		w.iovLen++
	}
	// Control, not Write: the latter lets one writer in at a time.
	err := q.raw.Control(w.fn)
	clear(w.iov[:w.iovLen])
	if err != nil {
		return fmt.Errorf("write packet: %w", closed(err))
	}
	if w.errno != 0 {
		return packetError("write", w.errno)
	}
	return nil
}

// SetReadDeadline lets ReadPacket return os.ErrDeadlineExceeded from t on. The
// zero time: never.
func (q *Queue) SetReadDeadline(t time.Time) error { return q.file.SetReadDeadline(t) }

// Close detaches the queue and ends its reader. The last queue takes the device
// with it.
func (q *Queue) Close() error { return q.file.Close() }

// closed gives the error of a RawConn its public name: it is a deadline's or
// says that the file was closed, and the runtime's own error for the latter
// cannot be named here.
func closed(err error) error {
	if errors.Is(err, os.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	return fmt.Errorf("%w (%w)", os.ErrClosed, err)
}

func packetError(verb string, errno syscall.Errno) error {
	if errno == unix.EBADFD {
		return fmt.Errorf("%s packet: %w: %w", verb, netns.ErrGone, errno)
	}
	return fmt.Errorf("%s packet: %w", verb, errno)
}

// IsEnd says whether an error of ReadPacket is the last one: the device was
// closed or its namespace has gone.
func IsEnd(err error) bool {
	return errors.Is(err, os.ErrClosed) || errors.Is(err, netns.ErrGone)
}

func iovec(b []byte) unix.Iovec {
	v := unix.Iovec{Base: unsafe.SliceData(b)}
	v.SetLen(len(b))
	return v
}

func join(slices [][]byte) []byte {
	var all []byte
	for _, b := range slices {
		all = append(all, b...)
	}
	return all
}
