// Package tun owns the device of an attachment and its queues: IP packets with
// offload headers in and out. It knows nothing of flows, routes or firewalls.
// attach opens the device, stack reads and writes the queues.
//
// # How water and the header flag come together
//
// A packet of a tun can carry a virtio-net header in front (IFF_VNET_HDR): then
// the kernel hands over whole 64 KiB segments with their checksums left open,
// and takes such, and one system call moves forty packets' worth. That is a
// factor of six to ten. The library that makes the device, songgao/water, opens
// its descriptor without the flag, and a queue that is attached beside an open
// one cannot turn it on: the kernel takes the flags of the first queue. So
//
//  1. water makes the device under a name of ours ("cgt<table>"), persistent
//     (and with IFF_MULTI_QUEUE where several queues are wanted), and is closed;
//  2. each queue is opened again with IFF_TUN | IFF_NO_PI | IFF_VNET_HDR
//     (| IFF_MULTI_QUEUE), and TUNSETOFFLOAD says which segments it takes;
//  3. TUNSETPERSIST 0 ties the device to the descriptors: it goes with them,
//     whatever way the process dies;
//  4. the device gets its alias ("cgtun_<table>", by which it is known as ours),
//     MTU and addresses, then its name, last, and goes up.
//
// What a kill leaves between 1 and 3 is a device of our temporary name without
// an open queue: the next Open with the same table takes it away.
//
// A queue keeps the namespace alive that it was opened in, after its last process,
// with all of its devices. Who opens one in another namespace than home has two ways
// out: to count who else keeps it (cgroupsel.Holders) and let go (LetGo), or, where
// the kernel does not let us count, to make the device elsewhere (Options.From) and have it moved
// in before step 4. When the namespace ends, reads and writes say so (netns.ErrGone;
// of a device that was moved EBADFD), and until then the queue leads back into it
// (TUNGETDEVNETNS).
//
// Addresses are set with IFA_F_NOPREFIXROUTE: they add no route for anybody
// else. Nothing else is added to the main table.
//
// See linux/Documentation/networking/tuntap.rst, if_tun.h, virtio_net.h (the
// ten-byte header, little-endian on the machines that cgtun is built for) and
// ip-address(8).
package tun
