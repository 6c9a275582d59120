package attach

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
)

// follow calls changed whenever links, addresses or routes of the namespace it
// runs in have changed, and whenever events may have been lost. Events only
// say "look again"; what they carry is not read. It returns when ctx ends.
func follow(ctx context.Context, log *slog.Logger, changed func()) {
	for ctx.Err() == nil {
		if err := followOnce(ctx, changed); err != nil {
			log.Debug("changes of the network are not told, asking again", "err", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
			changed() // for what was missed between
		}
	}
}

// followOnce subscribes until ctx ends or one of the subscriptions breaks off,
// as it does when its buffer has overflowed.
func followOnce(ctx context.Context, changed func()) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var readers sync.WaitGroup
	defer readers.Wait()
	defer cancel()
	done := ctx.Done()
	ignore := func(error) {}

	addrs := make(chan netlink.AddrUpdate)
	if err := netlink.AddrSubscribeWithOptions(addrs, done, netlink.AddrSubscribeOptions{ErrorCallback: ignore}); err != nil {
		return err
	}
	drain(&readers, addrs, cancel, changed)
	routes := make(chan netlink.RouteUpdate)
	if err := netlink.RouteSubscribeWithOptions(routes, done, netlink.RouteSubscribeOptions{ErrorCallback: ignore}); err != nil {
		return err
	}
	drain(&readers, routes, cancel, changed)
	links := make(chan netlink.LinkUpdate)
	if err := netlink.LinkSubscribeWithOptions(links, done, netlink.LinkSubscribeOptions{ErrorCallback: ignore}); err != nil {
		return err
	}
	drain(&readers, links, cancel, changed)
	changed()
	<-ctx.Done()
	return nil
}

// drain reads a subscription until it is closed, and ends the others then.
func drain[T any](readers *sync.WaitGroup, events <-chan T, end, changed func()) {
	readers.Go(func() {
		defer end()
		for range events {
			changed()
		}
	})
}
