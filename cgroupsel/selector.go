package cgroupsel

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf/btf"

	"cgtun/internal/netns"
)

// Bounds of what one selector holds.
const (
	// maxSelections is how many routes can select.
	maxSelections = 256
	// maxPaths is how many paths can be selected.
	maxPaths = 1024
	// maxPathLen is the longest of them: the trie compares 256 bytes with a
	// slash at the end.
	maxPathLen = pathBytes - 1
	// maxInstance bounds Options.Instance.
	maxInstance = 32
	// defaultCgroups is the default of Options.MaxCgroups: 1.2 MB of kernel memory.
	defaultCgroups = 16384
	// defaultNamespaces and defaultPerCgroup are those of Options.MaxNamespaces
	// and MaxPerCgroup.
	defaultNamespaces = 1024
	defaultPerCgroup  = 256
	// defaultPatience is that of Options.Patience. An attachment takes milliseconds,
	// and seconds where the kernel makes and removes hundreds of devices meanwhile.
	defaultPatience = 10 * time.Second
	// lookAgain is how often Run looks without having been told to.
	lookAgain = 2 * time.Second
)

// Options say what to select. Selections and Instance are needed.
type Options struct {
	Selections []Selection // one of each route, in the order of the routes
	Instance   string      // who we are: the table's number as text
	MaxCgroups int         // selected cgroups with all below, 0 is 16,384; those beyond are in Counters.Full
	// MaxNamespaces bounds the namespaces to be attached (0 is 1,024; those of
	// select.netns count, and are never above), and MaxPerCgroup those with tasks
	// of one and the same cgroup (0 is 256). on_exit decides about those above:
	// they have Namespace.Excess, and are in Counters.Excess.
	MaxNamespaces, MaxPerCgroup int
	// Patience is how long a namespace may stay undecided once something runs in
	// it, and a process held (0 is 10 s). Then the process goes on, and the gate is
	// as shut as before.
	Patience time.Duration
	// Follows: Follow will be called. Followed is with what it begins; what of it
	// another instance selects is left out, and said.
	Follows  bool
	Followed []Followed
	Logger   *slog.Logger // nil: silent
	// Without names features that are not to be used, as if the kernel
	// refused them: for tests, and to rule one out.
	Without []string
}

// Cgroup is a cgroup as it is now.
type Cgroup struct {
	Path      string // "/a/b"
	ID        uint64 // 0: not there; a cgroup that is made again has another one
	Level     int    // depth, as nft's `socket cgroupv2 level` counts: 2 for "/a/b"
	Selection int    // whose it is: an index of Options.Selections
	Present   bool
	Held      bool // made again, it is selected before a process can be in it
	Followed  bool // by Follow; then it is there
}

// Namespace is a network namespace that needs an attachment, or would but for
// Excess. All of a snapshot are different ones.
type Namespace struct {
	Ref    netns.Ref // leads in; without All as long as PID lives
	PID    int       // a selected task that was seen in it, 0: none was; it can have ended
	Cgroup uint64    // the id of that task's cgroup
	Idle   bool      // no selected task was in it at the last look
	Again  bool      // admitted as offline, and a task did exec or opened a socket since
	Excess error     // which bound it is above, and so is not to be attached; nil: none
	// All says that select.netns of the route with the index Selection names
	// it: everything in it is captured, whatever its cgroup. Home can be such
	// a namespace; without All none is home.
	All       bool
	Selection int
	// Running: a selected task in it has reached its exec or its first
	// socket; until then what sets the namespace up is at work.
	Running bool
}

// Snapshot is the whole newest picture. It is immutable.
type Snapshot struct {
	// Cgroups are the selected ones that are not below another one of the same
	// selection; plain paths are there in any case, whether Present or not.
	Cgroups []Cgroup
	// Namespaces are those of select.netns, as long as their names lead there,
	// and those others than home in which selected tasks were seen. The latter
	// stay until Forget.
	Namespaces []Namespace
}

// Counters count what went wrong in the kernel since New.
type Counters struct {
	Full    uint64 // new cgroups that MaxCgroups had no room for: uncaptured by BPF
	Unread  uint64 // new or ended cgroups whose path or id could not be read
	Refused uint64 // connects in which the mark could not be set
	Frames  uint64 // frames of packet(7) that were kept from devices, and ways around that which were refused

	GateDrops  uint64 // packets that the gate dropped
	GuardDrops uint64 // packets with our mark that would have left by another interface than their tun
	Lost       uint64 // records of new tasks for which there was no room; a look at all tasks follows
	Held       uint64 // tasks that were stopped until their namespace was decided about
	Late       uint64 // namespaces that were neither admitted nor denied in time
	Excess     uint64 // namespaces above the bounds: on_exit decided
}

// Selector selects cgroups from New to Close. It is safe for concurrent use.
type Selector struct {
	opts    Options
	log     *slog.Logger
	tree    *tree
	ids     *idCache
	names   *names
	plain   []entry
	picked  atomic.Pointer[chosen]
	prefix  string        // of our root from the real one
	again   chan struct{} // holds one token: look again
	asks    chan ask      // for Run to do
	maps    *maps         // nil: no BPF at all
	traces  hooks         // the tracepoints: of ended cgroups, of new ones
	layout  *layout       // of the kernel's structs; nil without traces
	root    rooted        // the socket programs
	options rooted        // the programs for socket options
	frames  *frames       // nil: no frames are kept from devices
	spaces  *spaces       // nil: no namespaces are found
	held    bool
	types   func() (*btf.Spec, error) // the kernel's, read at the first call, as that takes some 75 ms; New alone asks
	each    *each                     // nil: not used
	full    atomic.Uint64             // Counters.Full, as Run last saw it
	rivals  map[[2]int]bool
	every   time.Duration

	following sync.Mutex // held by Follow

	mu       sync.Mutex
	snapshot Snapshot
	features []Feature
	created  []string // ours by xattr, parents first
	self     Cgroup   // our own cgroup
	home     string   // where we were before we moved to self; "" if we did not
	closed   bool
}

// New selects. A TakenError says that another instance does already; nothing
// was changed then. Sockets are marked from here on; what they send goes the old
// way until steer has put its rules in. It moves this process into a cgroup of
// its own if it is in a selected one. The caller closes the Selector, also if
// Run was never called.
func New(o Options) (*Selector, error) {
	o, err := o.checked()
	if err != nil {
		return nil, err
	}
	pick, err := newPicker(o)
	if err != nil {
		return nil, fmt.Errorf("select cgroups: %w", err)
	}
	t, err := openTree()
	if err != nil {
		return nil, err
	}
	s := &Selector{opts: o, log: o.Logger, tree: t, ids: newIDCache(t), every: lookAgain, names: newNames(o), plain: o.plain(), again: make(chan struct{}, 1), asks: make(chan ask), rivals: make(map[[2]int]bool)}
	s.picked.Store(&chosen{picker: pick, opts: &o, base: pick})
	s.types = sync.OnceValues(btf.LoadKernelSpec)
	if err := s.begin(); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	s.types = nil // some megabytes
	return s, nil
}

// begin arms the kernel. The tracepoints come before the walk, so that no
// cgroup is missed between; our own cgroup before the socket programs, so that
// none of our sockets is marked.
func (s *Selector) begin() error {
	var refused error
	s.maps, refused = newMaps(s.opts.MaxCgroups)
	if refused == nil {
		refused = s.trace()
	}
	if isTaken(refused) {
		return refused
	}
	for _, e := range s.plain {
		if !s.now().Selections[e.selection].Create {
			continue
		}
		if err := s.create(e.path); err != nil {
			return err
		}
	}
	if refused == nil {
		refused = s.fill()
	}
	traced := s.note(FeatureMkdir, refused)
	if err := s.Follow(s.opts.Followed); err != nil {
		s.log.Warn("not all is selected", "err", err)
	}
	if err := s.stepOut(); err != nil {
		return err
	}
	if s.maps != nil {
		s.note(FeatureProcess, s.tryRemember())
	}
	if s.maps != nil && len(s.names.all) > 0 {
		err := s.maps.addNamed()
		if err == nil {
			err = s.tryNamed()
		}
		s.note(FeatureNetns, err)
	}
	if traced && s.note(FeatureRoot, s.armRoot()) {
		s.held = true
		s.note(FeatureFrames, s.tryFrames())
		s.note(FeatureOptions, s.armOptions())
		s.spaces, refused = s.openSpaces()
		s.note(FeatureTasks, refused)
	} else {
		s.dropTraces()
		s.armNamed()
		s.useEach()
	}
	s.resolve(&watcher{}, true)
	s.lookForSpaces()
	return nil
}

func (o Options) checked() (Options, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.MaxCgroups == 0 {
		o.MaxCgroups = defaultCgroups
	}
	if o.MaxNamespaces == 0 {
		o.MaxNamespaces = defaultNamespaces
	}
	if o.MaxPerCgroup == 0 {
		o.MaxPerCgroup = defaultPerCgroup
	}
	if o.Patience == 0 {
		o.Patience = defaultPatience
	}
	if o.Instance == "" || strings.ContainsRune(o.Instance, '/') || len(o.Instance) > maxInstance {
		return o, fmt.Errorf("select cgroups: instance %q is not a name", o.Instance)
	}
	o.Selections = slices.Clone(o.Selections)
	for i := range o.Selections {
		if o.Selections[i].Mask == 0 {
			o.Selections[i].Mask = ^uint32(0)
		}
		o.Selections[i].Cgroups = slices.Clone(o.Selections[i].Cgroups)
	}
	return o, o.check()
}

// Snapshot returns the newest picture. Run keeps it new.
func (s *Selector) Snapshot() Snapshot {
	s.mu.Lock()
	now := s.snapshot
	s.mu.Unlock()
	now.Namespaces = slices.Concat(now.Namespaces, s.spaces.list())
	return now
}

// Selected tells whether processes in a cgroup are captured, by its path, and
// by which selection: an index of Options.Selections.
func (s *Selector) Selected(cgroup string) (selection int, ok bool) {
	s.mu.Lock()
	own := s.home != "" && within(cgroup, s.self.Path)
	s.mu.Unlock()
	if own {
		return 0, false
	}
	return s.inSelection(cgroup)
}

func (s *Selector) inSelection(cgroup string) (selection int, ok bool) {
	at, ok := s.covering(cgroup)
	return at.selection, ok
}

// covering finds what is known of a path.
func (s *Selector) covering(cgroup string) (at spot, ok bool) {
	if path.Clean(cgroup) != cgroup || strings.HasPrefix(cgroup, "/..") {
		// Not the path that it seems to be ("/selected/../other"), or one
		// outside of our cgroup namespace.
		return spot{}, false
	}
	at = s.picker().find(cgroup)
	return at, at.selection != none
}

// Counters reads the counters of the kernel's side.
func (s *Selector) Counters() Counters {
	if s.maps == nil {
		return Counters{}
	}
	var n [countEntries]uint64
	for i := range n {
		// An array map of a known size: only a closed one fails, as zero.
		_ = s.maps.count.Lookup(uint32(i), &n[i])
	}
	all := Counters{Full: n[countFull], Unread: n[countPath], Refused: n[countMark], Frames: n[countFrame]}
	s.spaces.addTo(&all)
	return all
}

// isHeld tells whether the kernel itself selects every cgroup that is made.
func (s *Selector) isHeld() bool { return s.held && s.full.Load() == 0 }

// Run watches until ctx ends, and calls changed with the first picture and
// with each new one. It calls it from its own goroutine; while changed runs
// nothing is missed, as only the newest picture counts. It returns ctx's
// error, or why new namespaces cannot be told of any more: what is in force
// stays so until Close.
func (s *Selector) Run(ctx context.Context, changed func(Snapshot)) error {
	w := s.watch()
	defer w.close()
	failed, wait, err := s.spaces.run(ctx)
	if err != nil {
		return err
	}
	defer wait()
	tick := time.NewTicker(s.every)
	defer tick.Stop()
	s.look(w, true)
	changed(s.Snapshot())
	for {
		afresh := w.names == nil
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-failed:
			return err
		case <-s.spaces.changed():
			changed(s.Snapshot())
			continue
		case <-w.names:
			afresh = true
		case <-w.events:
		case <-s.again:
		case a := <-s.asks:
			err := s.reselect(a.selections)
			s.look(w, true)
			changed(s.Snapshot())
			a.done <- err
			continue
		case <-w.mounts.events:
			if afresh = s.names.moved(); !afresh {
				continue
			}
		case <-tick.C:
		}
		if s.look(w, afresh) {
			changed(s.Snapshot())
		}
	}
}

// look brings watches, programs and picture up to date. The watches come
// first: what happens after them wakes Run again. afresh says that names of
// namespaces may lead to others now.
func (s *Selector) look(w *watcher, afresh bool) bool {
	if full := s.Counters().Full; full > s.full.Load() {
		s.log.Warn("too many selected cgroups for the map", "limit", s.opts.MaxCgroups, "missed", full)
		s.useEach() // needs no entry in the map
		s.full.Store(full)
	}
	news := s.resolve(w, afresh)
	return s.lookForSpaces() || news
}

// Close lets everything go: programs and maps, our own cgroup, and those that
// we made and that are empty. Run must have returned.
func (s *Selector) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	created := s.created
	s.mu.Unlock()

	var errs []error
	if s.spaces != nil {
		errs = append(errs, s.spaces.close())
	}
	errs = append(errs, s.frames.Close(s.spaces.newest), s.options.Close(), s.root.Close())
	if s.each != nil {
		errs = append(errs, s.each.close())
	}
	errs = append(errs, s.stepBack(), s.removeCreated(created), s.traces.Close())
	if s.maps != nil {
		errs = append(errs, s.maps.Close())
	}
	return errors.Join(append(errs, s.tree.close())...)
}
