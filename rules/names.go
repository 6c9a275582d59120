package rules

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net/netip"

	"cgtun/flow"
)

// Names are names of hosts, as a list of them is kept until it is compiled: a
// line each, in lower case, the exact ones with a = in front. A million take
// about 20 MB.
type Names struct{ text []byte }

// Len returns how many there are.
func (n *Names) Len() int { return bytes.Count(n.text, []byte{'\n'}) }

func (n *Names) add(name string, exact bool) {
	if exact {
		n.text = append(n.text, '=')
	}
	n.text = append(append(n.text, name...), '\n')
}

// each calls f with every name.
func (n *Names) each(f func(name []byte, exact bool)) {
	for rest := n.text; len(rest) > 0; {
		end := bytes.IndexByte(rest, '\n')
		name, exact := bytes.CutPrefix(rest[:end], []byte{'='})
		f(name, exact)
		rest = rest[end+1:]
	}
}

// maxLine is the longest line of a list in bytes.
const maxLine = 64 << 10

// ReadNames reads a domain_file into n: a name a line, with all below it, or a
// hosts file, whose lines are an address and names, exactly these; blank lines,
// and comments from # to the end of the line. It calls bad for each line that is
// none of these, with its place from 1 and what is wrong, and goes on. The error
// is that of r, or a line of more than 64 KiB.
func (n *Names) ReadNames(r io.Reader, bad func(line, col int, what string)) error {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxLine)
	number := 0
	for lines.Scan() {
		number++
		line := lines.Bytes()
		if number == 1 {
			line = bytes.TrimPrefix(line, []byte("\ufeff"))
		}
		raw, _, _ := bytes.Cut(line, []byte("#"))
		n.readLine(bytes.Fields(raw), func(word []byte, what string) {
			bad(number, 1+bytes.Index(line, word), fmt.Sprintf(`%.60q %s; allowed: a name such as "example.org", one a line, or "ADDRESS NAME…"`, word, what))
		})
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("read line %d: %w", number+1, err)
	}
	return nil
}

func (n *Names) readLine(words [][]byte, bad func(word []byte, what string)) {
	hosts := len(words) > 1
	if hosts {
		if _, err := netip.ParseAddr(string(words[0])); err != nil {
			bad(words[0], "is no address before names")
			return
		}
		words = words[1:]
	}
	for _, word := range words {
		name, err := flow.PlainSuffix(string(word))
		if err != nil {
			bad(word, err.Error())
			continue
		}
		n.add(name, hosts)
	}
}
