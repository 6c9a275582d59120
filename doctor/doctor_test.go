package doctor_test

import (
	"context"
	"encoding/json"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"cgtun/doctor"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func says(results ...doctor.Result) doctor.Check {
	return func(context.Context) []doctor.Result { return results }
}

func TestOneBadCheckDoesNotHideTheOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		late := make(chan struct{})
		results := doctor.Run(t.Context(), doctor.Options{Timeout: time.Second},
			doctor.Named{Name: "first", Check: says(doctor.Result{Name: "a", State: doctor.OK, What: "there"})},
			doctor.Named{Name: "broken", Check: func(context.Context) []doctor.Result { panic("oh") }},
			doctor.Named{Name: "slow", Check: func(context.Context) []doctor.Result { <-late; return nil }},
			doctor.Named{Name: "obedient", Check: func(ctx context.Context) []doctor.Result {
				<-ctx.Done()
				return []doctor.Result{{Name: "obedient", State: doctor.Warn, What: "half known", Fix: "x"}}
			}},
			doctor.Named{Name: "silent", Check: says()},
			doctor.Named{Name: "last", Check: says(doctor.Result{Name: "b", State: doctor.Warn, What: "old", Fix: "apt-get upgrade"})},
		)
		close(late)
		synctest.Wait()
		var b strings.Builder
		doctor.Print(&b, results)
		const want = `ok     a: there
error  broken: the check itself broke: oh: nothing is known of it
       → run cgtun doctor again; if it stays so, please report it with this text
error  slow: no answer within 1s: nothing is known of it
       → run cgtun doctor again; if it stays so, please report it with this text
warn   obedient: half known
       → x
warn   b: old
       → apt-get upgrade

1 ok, 2 warnings, 2 errors
`
		if b.String() != want {
			t.Errorf("got:\n%s\nwant:\n%s", b.String(), want)
		}
	})
}

func TestInterruptedRunEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		start := time.Now()
		results := doctor.Run(ctx, doctor.Options{Timeout: time.Hour}, doctor.Named{Name: "slow", Check: func(ctx context.Context) []doctor.Result {
			<-ctx.Done()
			return nil
		}})
		if took := time.Since(start); took != time.Second || len(results) != 0 {
			t.Errorf("took %v and found %v", took, results)
		}
	})
}

func TestWorst(t *testing.T) {
	for want, states := range map[doctor.State][]doctor.State{
		doctor.OK:    {doctor.OK, doctor.OK},
		doctor.Warn:  {doctor.OK, doctor.Warn, doctor.OK},
		doctor.Error: {doctor.Error, doctor.Warn},
	} {
		var results []doctor.Result
		for _, s := range states {
			results = append(results, doctor.Result{State: s})
		}
		if got := doctor.Worst(results); got != want {
			t.Errorf("%v: got %s", states, got)
		}
	}
	if got := doctor.Worst(nil); got != doctor.OK {
		t.Errorf("nothing: got %s", got)
	}
}

func TestResultsAreLinesWhateverIsInThem(t *testing.T) {
	var b strings.Builder
	doctor.Print(&b, []doctor.Result{{Name: "device", State: doctor.Warn, What: "a\nok     b: \x1b[31m\u009b", Fix: "c\td"}})
	if got := strings.Count(b.String(), "\n"); got != 4 || strings.ContainsAny(b.String(), "\x1b\u009b\t") {
		t.Errorf("%q", b.String())
	}
}

func TestResultIsTheContractsJSON(t *testing.T) {
	got, err := json.Marshal(doctor.Result{Name: "tun", State: doctor.OK, What: "there"})
	if want := `{"name":"tun","state":"ok","what":"there","fix":""}`; err != nil || string(got) != want {
		t.Errorf("%s, %v", got, err)
	}
}
