package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"

	"cgtun/control"
)

// print ends a command that asked the daemon: with its error, the JSON that it
// sent, or the same for people.
func (c *call) print(raw json.RawMessage, err error, human func(io.Writer)) error {
	switch {
	case err != nil:
		return err
	case c.json:
		c.out.Write(raw)
		c.out.WriteByte('\n')
		return nil
	}
	human(c.out)
	return nil
}

// table aligns columns; several with heads can follow each other.
type table struct {
	w *tabwriter.Writer
}

func newTable(w io.Writer) table { return table{tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)} }

// head begins a new block of columns.
func (t table) head(names ...string) {
	t.w.Flush() // the columns of one block do not widen those of the next
	fmt.Fprintf(t.w, "\n%s\n", strings.Join(names, "\t"))
}

func (t table) row(cells ...any) {
	text := make([]string, len(cells))
	for i, c := range cells {
		text[i] = fmt.Sprint(c)
	}
	fmt.Fprintln(t.w, strings.Join(text, "\t"))
}

func (t table) flush() { t.w.Flush() }

// plain returns text that came from elsewhere as a terminal can show it: as it
// is if it is made of letters, digits and the usual marks, else quoted.
func plain(s string) string {
	safe := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("._-:/@+,[]%=*", r)
	}
	if s != "" && strings.IndexFunc(s, func(r rune) bool { return !safe(r) }) < 0 {
		return s
	}
	return strconv.QuoteToASCII(s)
}

// orDash is for text of our own that may be missing.
func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func number(id control.ID) string {
	if id == 0 {
		return "-"
	}
	return strconv.FormatUint(uint64(id), 10)
}

func decimal(f *float64, unit string) string {
	if f == nil {
		return "-"
	}
	return strconv.FormatFloat(*f, 'f', 1, 64) + unit
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// size is a number of bytes with a unit of 1024s.
func size[T int64 | uint64](n T) string {
	const units = "KMGTPE"
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	f, i := float64(n)/1024, 0
	for ; f >= 1024 && i < len(units)-1; i++ {
		f /= 1024
	}
	return fmt.Sprintf("%.1f %ciB", f, units[i])
}
