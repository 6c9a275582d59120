package cgroupsel

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync"
	"time"

	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"
)

const (
	// beatEvery is how often the reader gives a sign of life.
	beatEvery = 300 * time.Millisecond
	// watchEvery is how often deadlines are looked at, apart from the reader.
	watchEvery = 200 * time.Millisecond
	// readerNice is the priority of the reader's thread: a record is read
	// before busy programs of the machine have had their slice.
	readerNice = -10
)

// run reads records and keeps deadlines until ctx ends, or the caller calls wait,
// which it does in any case. What comes by failed is why no record is read any
// more.
func (d *spaces) run(ctx context.Context) (failed <-chan error, wait func(), err error) {
	if d == nil {
		return nil, func() {}, nil
	}
	ring, err := ringbuf.NewReader(d.m.seen)
	if err != nil {
		return nil, nil, fmt.Errorf("read records of new tasks: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	var work sync.WaitGroup
	ended := make(chan error, 1)
	work.Go(func() {
		if err := d.read(ring); !errors.Is(err, ringbuf.ErrClosed) {
			ended <- fmt.Errorf("read records of new tasks: %w", err)
		}
	})
	work.Go(func() { d.watch(ctx) })
	work.Go(func() { d.watchHeld(ctx) })
	stop := context.AfterFunc(ctx, func() { ring.Close() })
	return ended, func() {
		stop()
		cancel()
		ring.Close()
		work.Wait()
	}, nil
}

// read takes records until the ring is closed, which takes the sign of life
// away. Any other error leaves it to grow old: then nobody is held, and the gate
// stays shut until Close. Its thread dies with it, as its priority is not for
// others.
func (d *spaces) read(ring *ringbuf.Reader) error {
	runtime.LockOSThread()
	if err := unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), readerNice); err != nil {
		d.s.log.Debug("the reader of new tasks has no raised priority", "err", err)
	}
	var raw ringbuf.Record
	var r record
	for {
		ring.SetDeadline(time.Now().Add(beatEvery))
		err := ring.ReadInto(&raw)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
		case errors.Is(err, ringbuf.ErrClosed):
			d.pause()
			return err
		case err != nil:
			return err
		default:
			if _, err := binary.Decode(raw.RawSample, binary.NativeEndian, &r); err == nil {
				d.take(r)
			}
		}
		d.alive()
	}
}

// take acts on one record.
func (d *spaces) take(r record) {
	visits := d.visits(r)
	if !visits && d.see(r) {
		d.tellRun()
	}
	if r.Held != 0 {
		d.noteStop(r, visits)
	}
}

// decided says whether the gate knows the namespace.
func (d *spaces) decided(cookie uint64) bool {
	var k known
	return d.m.known.Lookup(cookie, &k) == nil && k.Flags&knownDoubts == 0
}

// alive is the sign of life without which nobody is held. Before Arm there is
// none.
func (d *spaces) alive() {
	d.mu.Lock()
	armed := !d.armed.IsZero()
	d.mu.Unlock()
	if armed {
		d.beat(now())
	}
}

// pause makes the programs hold nobody.
func (d *spaces) pause() { d.beat(0) }

// beat writes the sign of life. An array map of a known size takes it.
func (d *spaces) beat(at uint64) { _ = d.m.beat.Put(uint32(0), at) }

// now is the time of bpf_ktime_get_ns.
func now() uint64 {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) != nil {
		return 0
	}
	return uint64(ts.Nano())
}

// scan looks at all tasks of the machine: what was missed, who went on
// elsewhere, and which namespaces have no selected task any more. It reports
// whether the Snapshot is another one now.
func (d *spaces) scan() (news bool, err error) {
	start := time.Now()
	tasks, err := d.tasks()
	if err != nil {
		return false, err
	}
	inside := make(map[uint64][]record)
	for _, r := range tasks {
		inside[r.Cookie] = append(inside[r.Cookie], r)
	}
	for _, all := range inside {
		if d.see(all[0]) || d.follow(all) {
			news = true
		}
	}
	missed, left := d.missed(), d.leave(start)
	taken := d.takeIn()
	return news || missed || left || taken, nil
}

// missed makes good for records that were lost: any of them can have been of a
// namespace that is to be looked at again, or of a task that runs and was not
// held, as nobody would have been told.
func (d *spaces) missed() (news bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	lost := d.m.counter(countLost)
	if lost == d.lost {
		return false
	}
	d.lost = lost
	for _, sp := range d.by {
		news = news || (sp.tells && !sp.Again) || !sp.Running
		sp.Again, sp.Running = sp.tells, true
	}
	return news
}

// lose says whether records were lost since the last look at all tasks.
func (d *spaces) lose() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.m.counter(countLost) != d.lost
}

// tasks are all selected ones but our own, in all namespaces.
func (d *spaces) tasks() ([]record, error) {
	it, err := d.all.Open()
	if err != nil {
		return nil, fmt.Errorf("look at all tasks: %w", err)
	}
	defer it.Close()
	text, err := io.ReadAll(it)
	if err != nil {
		return nil, fmt.Errorf("look at all tasks: %w", err)
	}
	all := make([]record, len(text)/recordBytes)
	err = binary.Read(bytes.NewReader(text), binary.NativeEndian, all)
	return all, err
}

// follow finds another way into a namespace whose process is gone. The tasks
// are all that are in it.
func (d *spaces) follow(tasks []record) bool {
	d.mu.Lock()
	sp := d.by[tasks[0].Cookie]
	if sp == nil {
		d.mu.Unlock()
		return false
	}
	pid := sp.PID
	d.mu.Unlock()
	for _, r := range tasks {
		if int(r.PID) == pid {
			return false
		}
	}
	for _, r := range tasks {
		ref, ok := enter(r)
		if !ok {
			continue
		}
		d.mu.Lock()
		defer d.mu.Unlock()
		sp.Ref, sp.PID, sp.Cgroup = ref, int(r.PID), r.Cgroup
		return true
	}
	return false
}

// leave marks namespaces in which no task was seen since start as idle. What
// was never attached is dropped: there is nothing to undo.
func (d *spaces) leave(start time.Time) (news bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for cookie, sp := range d.by {
		if !sp.seen.Before(start) {
			continue
		}
		if sp.fate != admitted {
			d.drop(cookie)
			news = true
			continue
		}
		news = news || !sp.Idle
		sp.Idle = true
	}
	return news
}

// drop makes a namespace unknown again. It wants d.mu.
func (d *spaces) drop(cookie uint64) {
	delete(d.by, cookie)
	if err := d.m.forget(cookie, d.s.marks()); err != nil {
		d.s.log.Warn("forget namespace", "cookie", cookie, "err", err)
	}
}
