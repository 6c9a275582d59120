package steer

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"

	"github.com/google/nftables"
	mdl "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"cgtun/internal/netns"
)

// flagOwner is NFT_TABLE_F_OWNER: the table ends with the socket that made
// it, and is closed to all others.
const flagOwner = 2

// table is our nft table in the kernel and the socket that owns it.
type table struct {
	ref   *nftables.Table
	conn  *nftables.Conn
	sock  *mdl.Conn // conn's own; it goes with it
	owned bool
	now   *ruleset // what was sent last; nil before
}

// openTable opens the socket. It makes no table. The caller closes it.
func openTable(ns netns.Ref, number int) (*table, error) {
	t := &table{ref: tableOf(number)}
	keep := func(c *mdl.Conn) error {
		t.sock = c
		// A batch is one message to the kernel, as large as the bypass list
		// makes it, and each part of it is answered.
		return errors.Join(c.SetWriteBuffer(16<<20), c.SetReadBuffer(4<<20))
	}
	err := ns.Do(func() (err error) {
		t.conn, err = nftables.New(nftables.AsLasting(), nftables.WithSockOptions(keep))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open nftables in %s: %w", ns, err)
	}
	return t, nil
}

// create makes the table, empty. It is the lock on the instance's number: of
// two that try, one gets fs.ErrExist. A kernel without owned tables gets a
// plain one, and the caller a *FeatureError that it may go on with.
func (t *table) create(owner bool) error {
	if owner {
		err := t.createOwned()
		if err == nil {
			t.owned = true
			return nil
		}
		if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("make nft table %s: %w", t.ref.Name, err)
		}
	}
	t.conn.CreateTable(t.ref)
	if err := t.conn.Flush(); err != nil {
		return fmt.Errorf("make nft table %s: %w", t.ref.Name, err)
	}
	return &FeatureError{
		Feature: "owned nft tables", Since: "5.12", Err: unix.EOPNOTSUPP,
		Lost: "after kill -9 marks are still set until the next start, and a flushed ruleset is put back only afterwards",
	}
}

// createOwned is a batch of our own, for the library writes no table flags.
func (t *table) createOwned() error {
	attrs, err := mdl.MarshalAttributes([]mdl.Attribute{
		{Type: unix.NFTA_TABLE_NAME, Data: append([]byte(t.ref.Name), 0)},
		{Type: unix.NFTA_TABLE_FLAGS, Data: []byte{0, 0, 0, flagOwner}},
	})
	if err != nil {
		return err
	}
	nfgen := func(family byte, res uint16) []byte { // struct nfgenmsg
		return []byte{family, unix.NFNETLINK_V0, byte(res >> 8), byte(res)}
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
				Flags: mdl.Request | mdl.Acknowledge | mdl.Create | mdl.Excl,
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

// apply replaces the table's whole content in one transaction.
func (t *table) apply(r *ruleset) error {
	var old []string
	if t.now != nil {
		old = t.now.setNames()
	}
	if err := r.send(t.conn, old); err != nil {
		return err
	}
	if err := t.conn.Flush(); err != nil {
		return fmt.Errorf("write nft table %s: %w", t.ref.Name, err)
	}
	t.now = r
	return nil
}

// restore puts a plain table back that somebody flushed or deleted, and says
// whether it had to. Nobody else can touch an owned one.
func (t *table) restore() (bool, error) {
	if t.owned || t.now == nil {
		return false, nil
	}
	tables, err := t.conn.ListTablesOfFamily(t.ref.Family)
	if err != nil {
		return false, fmt.Errorf("list nft tables: %w", err)
	}
	here := slices.ContainsFunc(tables, func(o *nftables.Table) bool { return o.Name == t.ref.Name })
	if here {
		whole, err := t.whole()
		if whole || err != nil {
			return false, err
		}
		t.conn.DelTable(t.ref)
	}
	t.conn.AddTable(t.ref)
	if err := t.now.send(t.conn, nil); err != nil {
		return false, err
	}
	if err := t.conn.Flush(); err != nil {
		return false, fmt.Errorf("put nft table %s back: %w", t.ref.Name, err)
	}
	return true, nil
}

// whole says whether each chain still has all of its rules.
func (t *table) whole() (bool, error) {
	want := map[string]int{}
	for _, rule := range t.now.rules {
		want[rule.Chain.Name]++
	}
	for _, c := range t.now.chains {
		rules, err := t.conn.GetRules(t.ref, c)
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
	t.conn.DelTable(t.ref)
	if err := t.conn.Flush(); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("delete nft table %s: %w", t.ref.Name, err)
	}
	t.now = nil
	return nil
}

// counters reads the named counters.
func (t *table) counters() (map[string]uint64, error) {
	objs, err := t.conn.GetObjects(t.ref)
	if err != nil {
		return nil, fmt.Errorf("read counters of nft table %s: %w", t.ref.Name, err)
	}
	packets := map[string]uint64{}
	for _, o := range objs {
		if c, ok := o.(*nftables.CounterObj); ok {
			packets[c.Name] = c.Packets
		}
	}
	return packets, nil
}

func (t *table) close() error { return t.conn.CloseLasting() }
