package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"unicode"
	"unicode/utf16"

	"cgtun/control"
)

// print ends a command that asked the daemon: with its error, the JSON that it
// sent, or the same for people.
func (c *call) print(raw json.RawMessage, err error, human func(io.Writer)) error {
	switch {
	case err != nil:
		return err
	case c.json:
		c.out.Write(ascii(raw))
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

// orDash is for text that may be missing: sentences of our own, and what they quote
// of others.
func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return line(s)
}

// plainOrDash is for text that came from elsewhere and may be missing.
func plainOrDash(s control.Text) string {
	if s == "" {
		return "-"
	}
	return plain(string(s))
}

// line returns a sentence that may have text of others in it: quoted where that
// could move the cursor, or turn the direction in which it is read.
func line(s string) string {
	if strings.IndexFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) < 0 {
		return s
	}
	return strconv.QuoteToASCII(s)
}

// ascii returns the same JSON with nothing in it but what every terminal shows as it
// is: encoding/json leaves the control characters above 127 as they are, and those
// that turn the direction.
func ascii(raw json.RawMessage) []byte {
	safe := make([]byte, 0, len(raw))
	for _, r := range string(raw) {
		switch {
		case r < 0x7f:
			safe = append(safe, byte(r))
		case r <= 0xffff:
			safe = fmt.Appendf(safe, `\u%04x`, r)
		default:
			hi, lo := utf16.EncodeRune(r)
			safe = fmt.Appendf(safe, `\u%04x\u%04x`, hi, lo)
		}
	}
	return safe
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
