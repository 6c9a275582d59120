package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"cgtun/attach"
	"cgtun/cgroupsel"
	"cgtun/config"
	"cgtun/control"
	"cgtun/dns"
	"cgtun/docker"
	"cgtun/flow"
	"cgtun/internal/netns"
	"cgtun/metrics"
	"cgtun/router"
	"cgtun/stack"
	"cgtun/steer"
)

// instance is a running cgtun: the parts, wired, and what control shows of
// them.
type instance struct {
	first *config.File // as it was at the start
	log   *slog.Logger
	since time.Time

	selector  *cgroupsel.Selector
	docker    *docker.Finder // nil: nothing of docker is selected
	manager   *attach.Manager
	router    *router.Router
	guard     guard
	resolver  *dns.Resolver
	loopback  *dns.Listener  // nil: there is none
	origins   *steer.Origins // nil: the kernel does not tell
	load      func() (*config.File, error)
	level     *slog.LevelVar // of log
	now       atomic.Pointer[ways]
	fresh     chan *ways // to be run in place of those before
	reloading sync.Mutex
	stopping  chan struct{} // closed then
	reloads   reloads
	earlier   [][]steer.Mark // of each route: marks that it had
	plain     uint64         // bytes at the start
	buffers   *stack.Buffers // of all stacks
	stacks    stacks
	state     atomic.Value // control.State
	metrics   *metrics.Metrics
	nofile    uint64         // limit of open files
	hangup    chan os.Signal // SIGHUP
	server    *control.Server
}

// source is the configuration, as it is and as it may be next.
type source struct {
	file *config.File
	load func() (*config.File, error) // reads it again
}

// runDaemon captures what the file selects until ctx ends, and leaves the
// system as it was.
func runDaemon(ctx context.Context, from source, log *slog.Logger, level *slog.LevelVar) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("to capture needs root: start it with sudo")
	}
	file := from.file
	in := &instance{
		first: file, log: log, since: time.Now(), hangup: make(chan os.Signal, 1), buffers: stack.NewBuffers(),
		load: from.load, level: level, fresh: make(chan *ways, 1), stopping: make(chan struct{}),
	}
	signal.Notify(in.hangup, unix.SIGHUP)
	defer signal.Stop(in.hangup)
	in.state.Store(control.Starting)
	for _, what := range file.NotServed() {
		log.Info(what)
	}
	server, err := control.Listen(control.Options{Socket: file.Control.Socket, Source: in, Log: log})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, server.Close()) }()
	in.server = server

	in.metrics = metrics.New(in.measure, in.isGroup)
	var scraped net.Listener // nil: nobody asks
	if at := file.Control.Metrics; at != "" {
		if scraped, err = metrics.Listen(at); err != nil {
			return err
		}
		defer scraped.Close()
	}
	if err := in.setLimits(); err != nil {
		return err
	}
	if err := in.setRouter(); err != nil {
		return err
	}
	routes := attachRoutes(in.routes())
	for i := range routes {
		if err := attach.Check(&routes[i]); err != nil {
			return err
		}
	}
	if err := in.removeDead(); err != nil {
		log.Warn("something of a dead instance is left", "err", err)
	}
	options := cgroupsel.Options{Selections: selections(in.routes()), Instance: strconv.Itoa(in.routes()[0].Table), Logger: log}
	if dockerMode(in.routes()) != cgroupsel.DockerOff {
		in.docker = docker.NewFinder(log)
		// What is there already is captured when this is ready.
		options.Follows, options.Followed = true, in.followed(in.scanDocker(ctx))
	}
	in.selector, err = cgroupsel.New(options)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, in.selector.Close()) }()
	for _, f := range in.selector.Features() {
		if f.Err != nil {
			log.Warn("the kernel offers less than is wanted", "feature", f.Name, "err", f.Err)
		}
	}
	in.listenLoopback()
	if in.loopback != nil {
		defer in.loopback.Close()
	}
	if in.origins != nil {
		defer in.origins.Close()
	}
	in.setManager(routes)
	return in.run(ctx, server, scraped)
}

// removeDead takes away what dead instances left outside of home, but for what
// blocks on purpose.
func (in *instance) removeDead() error {
	home, err := netns.Home()
	if err != nil {
		return err
	}
	_, err = removeElsewhere(home, false)
	_, cgroupErr := removeDeadCgroups()
	return errors.Join(err, cgroupErr)
}

// run runs the parts that have goroutines until ctx ends or one of them fails.
// The control socket goes last: it tells "stopping" until the end.
func (in *instance) run(ctx context.Context, server *control.Server, scraped net.Listener) error {
	serving, stopServing := context.WithCancel(context.WithoutCancel(ctx))
	served := make(chan error, 1)
	go func() { served <- server.Run(serving) }()

	work, ctx := errgroup.WithContext(ctx)
	work.Go(func() error { return notCanceled(in.selector.Run(ctx, in.manager.Reconcile)) })
	if in.docker != nil {
		work.Go(func() error { return notCanceled(in.docker.Run(ctx, in.followDocker)) })
	}
	work.Go(func() error { return in.onHangup(ctx) })
	work.Go(func() error { return in.watchdog(ctx) })
	work.Go(func() error { return in.router.Run(ctx) })
	work.Go(func() error { return in.resolver.Run(ctx) })
	work.Go(func() error { return in.runWays(ctx) })
	if in.loopback != nil {
		work.Go(func() error { return in.loopback.Run(ctx, in.router.Way) })
	}
	if scraped != nil {
		work.Go(func() error { return in.metrics.Serve(ctx, scraped) })
	}
	work.Go(func() error { return in.manager.Run(ctx, in.ready) })
	work.Go(func() error {
		<-ctx.Done()
		in.state.Store(control.Stopping)
		close(in.stopping)
		in.notify(daemon.SdNotifyStopping)
		return nil
	})
	err := work.Wait()
	stopServing()
	return errors.Join(err, <-served)
}

// onHangup reloads at each SIGHUP. What becomes of that is in the log.
func (in *instance) onHangup(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-in.hangup:
			if err := in.Reload(ctx); err != nil {
				in.log.Warn("SIGHUP changed nothing", "err", err)
			}
		}
	}
}

func notCanceled(err error) error {
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

func (in *instance) ready() {
	if !in.state.CompareAndSwap(control.Starting, control.Ready) {
		return // told to stop meanwhile
	}
	in.log.Info(readyMessage)
	in.notify(daemon.SdNotifyReady)
}

// notify tells systemd, where it has asked for that.
func (in *instance) notify(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		in.log.Warn("systemd could not be told", "err", err)
	}
}

// file is the one that is in force.
func (in *instance) file() *config.File {
	if w := in.now.Load(); w != nil {
		return w.file
	}
	return in.first
}

// routes are at least one.
func (in *instance) routes() []config.Route { return in.file().Routes() }

func (in *instance) setLimits() error {
	var nofile unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &nofile); err != nil {
		return fmt.Errorf("read the limit of open files: %w", err)
	}
	nofile.Cur = nofile.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &nofile); err != nil {
		return fmt.Errorf("raise the limit of open files to %d: %w", nofile.Max, err)
	}
	in.nofile = nofile.Cur
	in.log.Info("limits", "nofile", nofile.Cur, "memory", in.first.Limits.Memory)
	// Above the start, as the router counts too: it refuses new flows before
	// the collector has to work without end.
	var start runtime.MemStats
	runtime.ReadMemStats(&start)
	in.plain = start.Sys - start.HeapReleased
	debug.SetMemoryLimit(int64(in.plain) + router.CollectorLimit(int64(in.first.Limits.Memory)))
	return nil
}

// ownFiles are the descriptors kept from the flows: for control clients with
// their pidfds, kernel objects, and what steering opens to follow changes.
const ownFiles = 512

// maxSockets is what the limit of open files leaves to the flows: with the own
// ones nine tenths of it are in use at most.
func (in *instance) maxSockets() int {
	n := in.nofile / 10 * 9
	return int(max(n-min(n, ownFiles), n/2))
}

// mostQuestions bounds the sockets to resolvers.
const mostQuestions = 512

func (in *instance) setRouter() error {
	w, err := in.newWays(in.first, nil)
	if err != nil {
		return err
	}
	// Beside what is left to the flows.
	in.resolver = dns.New(dns.Options{Logger: in.log, InFlight: int(min(mostQuestions, in.nofile/8))})
	in.router = router.New(router.Options{Logger: in.log, Meter: in.metrics, Owners: owners{in}, Guard: &in.guard, Resolver: in.resolver, MaxSockets: in.maxSockets(),
		MaxMemory: int64(in.first.Limits.Memory), MemoryUsed: in.buffers.Fit})
	in.use(w)
	return nil
}

// listenLoopback opens the sockets for what is asked of resolvers on home's
// loopback and its own networks. Without them those are asked as if there were no
// cgtun.
func (in *instance) listenLoopback() {
	var origin dns.Origin
	var err error
	if in.origins, err = steer.OpenOrigins(); err != nil {
		in.log.Warn("resolvers on the machine's own networks are asked the ordinary way", "err", err)
	} else {
		origin = func(proto flow.Proto, from, here netip.AddrPort) (netip.AddrPort, error) {
			return in.origins.Of(uint8(proto), from, here)
		}
	}
	l, err := in.resolver.Listen(attach.Home, origin)
	if err != nil {
		in.log.Warn("resolvers on loopback are asked the ordinary way", "err", err)
		return
	}
	in.loopback = l
}

func (in *instance) setManager(routes []attach.Route) {
	for i, p := range in.plans(in.first) {
		routes[i].Plan, routes[i].OnLink = p, in.origins != nil
	}
	var isolated func(netip.Addr) (bool, error)
	if in.docker != nil {
		isolated = in.docker.Internal
	}
	in.manager = attach.New(attach.Options{
		Isolated: isolated,
		Routes:   routes, Serve: in.serve, Gate: in.selector, CgroupPath: in.selector.PathByID, Selection: in.selectionOf, Process: in.selector.PID, HomeChanged: in.guard.LookAgain, Logger: in.log,
	})
	in.manager.Reconcile(in.selector.Snapshot())
}

// selectionOf is the index of the route that selects a cgroup.
func (in *instance) selectionOf(cgroup uint64) (int, bool) {
	path, ok := in.selector.PathByID(cgroup)
	if !ok {
		return 0, false
	}
	return in.selector.Selected(path)
}

// serve is the netstack of an attachment.
func (in *instance) serve(ctx context.Context, a *attach.Attachment) error {
	defer in.router.ForgetAttachment(a.ID)
	in.guard.LookAgain() // the device has addresses
	defer in.resolver.Forget(a.ID)
	return in.stacks.serve(ctx, a, in.router, stack.Options{Logger: in.log, TCP: stack.TCPOptions{Buffers: in.buffers}})
}
