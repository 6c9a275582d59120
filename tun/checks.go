package tun

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"cgtun/doctor"
	"cgtun/internal/netns"
)

// Checks looks at what a device needs: /dev/net/tun and its offloads, by
// opening a device in a namespace that is made for that and goes at once; and
// at the names and the addresses of the wanted devices in ns, which a running
// instance of the same table may have. Without root it says what it could not
// try.
func Checks(ns netns.Ref, wanted ...Options) []doctor.Named {
	all := []doctor.Named{{Name: "tun", Check: checkDriver}}
	for _, o := range wanted {
		name := "device " + o.Name
		all = append(all, doctor.Named{Name: name, Check: func(context.Context) []doctor.Result { return checkFree(name, ns, o) }})
	}
	return all
}

func found(name string, state doctor.State, what, fix string) []doctor.Result {
	return []doctor.Result{{Name: name, State: state, What: what, Fix: fix}}
}

func checkDriver(context.Context) []doctor.Result {
	const name = "tun"
	if os.Geteuid() != 0 {
		return found(name, doctor.Warn, "not looked at: that needs root", "sudo cgtun doctor")
	}
	uso, err := tryQueue()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return found(name, doctor.Error, err.Error()+": there can be no device",
			"modprobe tun; where the file alone is missing, as in a container: mkdir -p /dev/net && mknod /dev/net/tun c 10 200")
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return found(name, doctor.Error, err.Error()+": the kernel has no tun driver loaded", "modprobe tun, or a kernel with CONFIG_TUN")
	case errors.Is(err, fs.ErrPermission):
		return found(name, doctor.Error, err.Error()+": there can be no device",
			"give cgtun CAP_NET_ADMIN and the device (in a container --cap-add NET_ADMIN --device /dev/net/tun; in a systemd unit no PrivateDevices=)")
	case err != nil:
		return found(name, doctor.Error, err.Error()+": there can be no device", "a kernel with CONFIG_TUN")
	case !uso:
		return found(name, doctor.Warn, "a device can be opened, with virtio-net headers, but its UDP segments cannot be joined (kernels have that since 6.2): UDP is slower", "run a kernel since 6.2")
	}
	return found(name, doctor.OK, "a device can be opened, with virtio-net headers and the offloads of TCP and UDP", "")
}

// tryQueue opens a device in a namespace of its own, and says whether the kernel
// joins UDP segments.
func tryQueue() (uso bool, err error) {
	ns, end, err := netns.Private()
	if err != nil {
		return false, err
	}
	defer end.Close()
	err = ns.Do(func() error {
		q, err := attachQueue(temporaryPrefix+"doctor", true)
		if err != nil {
			return err
		}
		var errUSO error
		err = q.raw.Control(func(fd uintptr) { errUSO = unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, offloadAll) })
		uso = errUSO == nil
		return errors.Join(err, q.Close())
	})
	return uso, err
}

// checkFree says who has the name or an address. A device with our alias is
// that of the instance itself.
func checkFree(name string, ns netns.Ref, o Options) []doctor.Result {
	var results []doctor.Result
	err := ns.Do(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("open netlink: %w", err)
		}
		defer h.Close()
		if l, err := h.LinkByName(o.Name); err == nil && l.Attrs().Alias == Alias(o.Table) {
			results = found(name, doctor.OK, "it is this instance's own", "")
			return nil
		}
		used, err := prefixesInUse(h, o.Addresses)
		if err != nil {
			return err
		}
		_, errName := freeName(h, o)
		if err := errors.Join(errName, used.allFree(o.Addresses)); err != nil {
			return err
		}
		results = found(name, doctor.OK, "the name is free", "")
		return nil
	})
	var taken *TakenError
	switch {
	case errors.As(err, &taken):
		return found(name, doctor.Error, strings.ReplaceAll(err.Error(), "\n", "; ")+": a start is refused", "set another name or other addresses in [tun]")
	case err != nil:
		return found(name, doctor.Warn, err.Error()+": whether the name is free is not known", "sudo cgtun doctor")
	}
	return results
}
