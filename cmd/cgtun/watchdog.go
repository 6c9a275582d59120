package main

import (
	"context"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// watchdog tells systemd at the pace that it asked for (WatchdogSec, sd_notify(3))
// that this instance still answers. It asks each part what status asks: a part
// that hangs keeps the next message back, and systemd then ends the process
// with a dump of its goroutines and starts it again. Where nobody asked for it
// it returns at once.
func (in *instance) watchdog(ctx context.Context) error {
	limit, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		in.log.Warn("the watchdog of systemd is not served", "err", err)
	}
	if limit == 0 {
		return nil
	}
	tick := time.NewTicker(limit / 3)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			in.Status()
			in.Flows()
			in.notify(daemon.SdNotifyWatchdog)
		}
	}
}
