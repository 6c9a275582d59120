// Package doctor has the words for what is wrong with a machine, runs the
// checks that find it, and prints what they say.
//
// It owns no check: each lives with what it looks at (cgroupsel.Checks,
// steer.Checks, tun.Checks), and cmd/cgtun lists them. It imports none of
// ours.
package doctor

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"strings"
	"time"
)

// State says how bad it is.
type State string

// The states.
const (
	OK    State = "ok"
	Warn  State = "warn"  // cgtun works, and something is lost
	Error State = "error" // cgtun does not work
)

// Result is what one check found about one thing.
type Result struct {
	Name  string `json:"name"`  // the thing, in a few words; the same whatever is found
	State State  `json:"state"` // how bad it is
	What  string `json:"what"`  // what was found and, if it is bad, what is lost
	Fix   string `json:"fix"`   // the command or the change that mends it; "" if OK
}

// Check looks at something and says what it found. It changes nothing that
// outlives it, ends soon after its context does, and may find nothing to say.
type Check func(context.Context) []Result

// Named is a check with the name that stands for it when it does not end well.
type Named struct {
	Name  string
	Check Check
}

// Options say how to run checks. Zero values mean the defaults.
type Options struct {
	Timeout time.Duration // for each check; 5 s
}

// Run runs the checks one after the other, as some would see each other's
// trials, and returns all that they found, in their order. A check that
// panics, or does not end in time, is an Error of its own name, and the others
// go on. A check that ignores its context is left to itself: the process is
// expected to end soon.
func Run(ctx context.Context, o Options, checks ...Named) []Result {
	o.Timeout = cmp.Or(o.Timeout, 5*time.Second)
	results := []Result{}
	for _, c := range checks {
		results = append(results, runOne(ctx, o, c)...)
	}
	return results
}

func runOne(ctx context.Context, o Options, c Named) []Result {
	limited, cancel := context.WithTimeout(ctx, o.Timeout)
	defer cancel()
	done := make(chan []Result, 1)
	go func() {
		defer func() {
			if p := recover(); p != nil {
				done <- broken(c.Name, fmt.Sprintf("the check itself broke: %v", p))
			}
		}()
		done <- c.Check(limited)
	}()
	select {
	case r := <-done:
		return r
	case <-limited.Done():
	}
	// What it had to say a moment before counts more than that it was late.
	select {
	case r := <-done:
		return r
	case <-time.After(o.Timeout / 10):
	}
	if ctx.Err() != nil {
		return broken(c.Name, "the check was interrupted")
	}
	return broken(c.Name, fmt.Sprintf("no answer within %v", o.Timeout))
}

func broken(name, what string) []Result {
	return []Result{{
		Name: name, State: Error, What: what + ": nothing is known of it",
		Fix: "run cgtun doctor again; if it stays so, please report it with this text",
	}}
}

// Worst returns the worst state of all results; OK if there are none.
func Worst(results []Result) State {
	worst := OK
	for _, r := range results {
		if r.State == Error || r.State == Warn && worst == OK {
			worst = r.State
		}
	}
	return worst
}

// Print writes the results for people: a line for what is well, a paragraph
// with the way to mend it for what is not, and a last line that counts.
func Print(w io.Writer, results []Result) {
	count := map[State]int{}
	for _, r := range results {
		count[r.State]++
		fmt.Fprintf(w, "%-6s %s: %s\n", r.State, oneLine(r.Name), oneLine(r.What))
		if r.Fix != "" {
			fmt.Fprintf(w, "       → %s\n", oneLine(r.Fix))
		}
	}
	fmt.Fprintf(w, "\n%d ok, %d warnings, %d errors\n", count[OK], count[Warn], count[Error])
}

// oneLine keeps what came from elsewhere, such as the name of a device, from
// looking like another result or from reaching the terminal's control codes.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			return ' '
		}
		return r
	}, s)
}
