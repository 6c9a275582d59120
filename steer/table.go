package steer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sync"

	"github.com/google/nftables"
	mdl "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"cgtun/internal/netns"
)

// Flags of a table.
const (
	flagOwner   = 2 // it ends with the socket that made it, and is closed to all others
	flagPersist = 4 // it stays then, without an owner, to be taken over (Linux 6.9)
)

// table is our nft table in the kernel. In home it keeps a socket, which owns
// the table; a socket would keep another namespace alive, so there each call
// opens one and closes it.
type table struct {
	ns    netns.Ref
	at    place
	ref   *nftables.Table
	flags uint32   // that it was made with
	now   *ruleset // what was sent last; nil before
	gen   uint32   // the generation of the namespace's ruleset when that was seen whole
	hold  *nftables.Conn
	sock  *mdl.Conn // of hold; it goes with it
	// closing are the sockets that are not held and not closed yet.
	closing sync.WaitGroup
}

// openTable opens the socket in home. It makes no table. The caller closes it.
func openTable(ns netns.Ref, number int, home bool) (*table, error) {
	t := &table{ns: ns, ref: tableOf(number)}
	if !home {
		home, err := netns.Home()
		t.at = place{away: true, home: home.Cookie()}
		return t, err
	}
	err := ns.Do(func() (err error) {
		t.hold, t.sock, err = dialTables()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open nftables in %s: %w", ns, err)
	}
	return t, nil
}

// dialTables opens a socket in the namespace of the calling thread.
func dialTables() (conn *nftables.Conn, sock *mdl.Conn, err error) {
	keep := func(c *mdl.Conn) error {
		sock = c
		// A batch is one message to the kernel, as large as the bypass list
		// makes it, and each part of it is answered.
		return errors.Join(c.SetWriteBuffer(16<<20), c.SetReadBuffer(4<<20))
	}
	conn, err = nftables.New(nftables.AsLasting(), nftables.WithSockOptions(keep))
	return conn, sock, err
}

// with calls f with a socket of the table's namespace. One that is not held is
// closed behind its back: the kernel lets that wait until what a transaction took
// away is freed, for a grace period of RCU, 10 ms and more.
func (t *table) with(f func(*nftables.Conn, *mdl.Conn) error) error {
	if t.hold != nil {
		return f(t.hold, t.sock)
	}
	return t.ns.Do(func() error {
		conn, sock, err := dialTables()
		if err != nil {
			return fmt.Errorf("open nftables in %s: %w", t.ns, err)
		}
		defer t.closing.Go(func() { _ = conn.CloseLasting() })
		return f(conn, sock)
	})
}

// create makes the table in home, empty. It is the lock on the instance's
// number: of two that try, one gets fs.ErrExist. With closed it outlives us,
// and one that did so is taken over as it is. A kernel without such tables gets
// a plain one, and the caller a *FeatureError that it may go on with.
func (t *table) create(owner, closed bool) error {
	t.flags = flagOwner
	if closed {
		t.flags |= flagPersist
	}
	if owner {
		err := t.createOwned(mdl.Excl)
		if errors.Is(err, fs.ErrExist) && closed {
			err = t.createOwned(0)
		}
		switch {
		case err == nil:
			return nil
		case errors.Is(err, unix.EPERM), errors.Is(err, fs.ErrExist):
			return fmt.Errorf("make nft table %s: %w", t.ref.Name, fs.ErrExist)
		case !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EINVAL):
			return fmt.Errorf("make nft table %s: %w", t.ref.Name, err)
		}
	}
	t.flags = 0
	t.hold.CreateTable(t.ref)
	err := t.hold.Flush()
	if err != nil && !(closed && errors.Is(err, fs.ErrExist)) {
		return fmt.Errorf("make nft table %s: %w", t.ref.Name, err)
	}
	if closed {
		return &FeatureError{
			Feature: "persistent nft tables with an owner", Since: "6.9", Err: unix.EOPNOTSUPP,
			Lost: "a flushed ruleset is put back only afterwards",
		}
	}
	return &FeatureError{
		Feature: "owned nft tables", Since: "5.12", Err: unix.EOPNOTSUPP,
		Lost: "after kill -9 marks are still set until the next start, and a flushed ruleset is put back only afterwards",
	}
}

func nfgen(family byte, res uint16) []byte { // struct nfgenmsg
	return []byte{family, unix.NFNETLINK_V0, byte(res >> 8), byte(res)}
}

// createOwned is a batch of our own, for the library writes no table flags.
func (t *table) createOwned(excl mdl.HeaderFlags) error {
	attrs, err := mdl.MarshalAttributes([]mdl.Attribute{
		{Type: unix.NFTA_TABLE_NAME, Data: append([]byte(t.ref.Name), 0)},
		{Type: unix.NFTA_TABLE_FLAGS, Data: binary.BigEndian.AppendUint32(nil, t.flags)},
	})
	if err != nil {
		return err
	}
	batch := func(kind int) mdl.Message {
		return mdl.Message{
			Header: mdl.Header{Type: mdl.HeaderType(kind), Flags: mdl.Request},
			Data:   nfgen(0, unix.NFNL_SUBSYS_NFTABLES),
		}
	}
	_, err = t.sock.SendMessages([]mdl.Message{
		batch(unix.NFNL_MSG_BATCH_BEGIN),
		{
			Header: mdl.Header{
				Type:  mdl.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWTABLE),
				Flags: mdl.Request | mdl.Acknowledge | mdl.Create | excl,
			},
			Data: append(nfgen(byte(t.ref.Family), 0), attrs...),
		},
		batch(unix.NFNL_MSG_BATCH_END),
	})
	if err != nil {
		return err
	}
	_, err = t.sock.Receive()
	return err
}

// apply replaces the table's whole content in one transaction. What an earlier
// process left in it goes, too.
func (t *table) apply(r *ruleset) error {
	return t.with(func(conn *nftables.Conn, sock *mdl.Conn) (err error) {
		old := t.now
		switch {
		case old != nil:
		case t.at.away:
			if err := t.anew(conn); err != nil {
				return err
			}
		default:
			if old, err = t.earlier(conn); err != nil {
				return err
			}
		}
		if err := r.send(conn, old); err != nil {
			return err
		}
		if err := conn.Flush(); err != nil {
			return fmt.Errorf("write nft table %s: %w", t.ref.Name, err)
		}
		t.now, t.gen = r, generation(sock)
		return nil
	})
}

// anew queues an empty table in place of whatever is there.
func (t *table) anew(conn *nftables.Conn) error {
	there, err := t.there(conn)
	if err != nil {
		return err
	}
	if there {
		conn.DelTable(t.ref)
	}
	conn.AddTable(t.ref)
	return nil
}

func (t *table) there(conn *nftables.Conn) (bool, error) {
	tables, err := conn.ListTablesOfFamily(t.ref.Family)
	if err != nil {
		return false, fmt.Errorf("list nft tables: %w", err)
	}
	return slices.ContainsFunc(tables, func(o *nftables.Table) bool { return o.Name == t.ref.Name }), nil
}

// earlier lists what a table holds that was taken over.
func (t *table) earlier(conn *nftables.Conn) (*ruleset, error) {
	sets, err := conn.GetSets(t.ref)
	if err != nil {
		return nil, fmt.Errorf("list sets of nft table %s: %w", t.ref.Name, err)
	}
	all, err := conn.ListChainsOfTableFamily(t.ref.Family)
	if err != nil {
		return nil, fmt.Errorf("list nft chains: %w", err)
	}
	all = slices.DeleteFunc(all, func(c *nftables.Chain) bool { return c.Table.Name != t.ref.Name })
	return &ruleset{table: t.ref, sets: sets, chains: all}, nil
}

// restore puts a plain table back that somebody flushed or deleted, and says
// whether it had to. Nobody else can touch an owned one.
func (t *table) restore() (changed bool, err error) {
	if t.flags&flagOwner != 0 || t.now == nil {
		return false, nil
	}
	err = t.with(func(conn *nftables.Conn, sock *mdl.Conn) error {
		gen := generation(sock)
		if gen != 0 && gen == t.gen {
			return nil
		}
		whole, err := t.whole(conn)
		if err != nil {
			return err
		}
		if whole {
			t.gen = gen
			return nil
		}
		if err := t.anew(conn); err != nil {
			return err
		}
		if err := t.now.send(conn, nil); err != nil {
			return err
		}
		if err := conn.Flush(); err != nil {
			return fmt.Errorf("put nft table %s back: %w", t.ref.Name, err)
		}
		changed, t.gen = true, generation(sock)
		return nil
	})
	return changed, err
}

// generation is the number of the last change to any table of the socket's
// namespace; 0 where the kernel does not say.
func generation(sock *mdl.Conn) uint32 {
	answers, err := sock.Execute(mdl.Message{
		Header: mdl.Header{Type: mdl.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETGEN), Flags: mdl.Request},
		Data:   nfgen(0, 0),
	})
	if err != nil || len(answers) == 0 || len(answers[0].Data) < 4 {
		return 0
	}
	attrs, err := mdl.UnmarshalAttributes(answers[0].Data[4:])
	if err != nil {
		return 0
	}
	for _, a := range attrs {
		if a.Type == unix.NFTA_GEN_ID && len(a.Data) == 4 {
			return binary.BigEndian.Uint32(a.Data)
		}
	}
	return 0
}

// whole says whether the table is there and each chain still has all of its
// rules.
func (t *table) whole(conn *nftables.Conn) (bool, error) {
	if there, err := t.there(conn); !there || err != nil {
		return false, err
	}
	want := map[string]int{}
	for _, rule := range t.now.rules {
		want[rule.Chain.Name]++
	}
	for _, c := range t.now.chains {
		rules, err := conn.GetRules(t.ref, c)
		if errors.Is(err, fs.ErrNotExist) {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("list nft rules: %w", err)
		}
		if len(rules) != want[c.Name] {
			return false, nil
		}
	}
	return true, nil
}

// remove deletes the table. It is no error if it is gone.
func (t *table) remove() error {
	err := t.with(func(conn *nftables.Conn, _ *mdl.Conn) error {
		conn.DelTable(t.ref)
		return conn.Flush()
	})
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("delete nft table %s: %w", t.ref.Name, err)
	}
	t.now = nil
	return nil
}

// counters reads the named counters.
func (t *table) counters() (map[string]uint64, error) {
	packets := map[string]uint64{}
	err := t.with(func(conn *nftables.Conn, _ *mdl.Conn) error {
		objs, err := conn.GetObjects(t.ref)
		if err != nil {
			return fmt.Errorf("read counters of nft table %s: %w", t.ref.Name, err)
		}
		for _, o := range objs {
			if c, ok := o.(*nftables.CounterObj); ok {
				packets[c.Name] = c.Packets
			}
		}
		return nil
	})
	return packets, err
}

func (t *table) close() error {
	t.closing.Wait()
	if t.hold == nil {
		return nil
	}
	return t.hold.CloseLasting()
}
