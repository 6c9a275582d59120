package survival_test

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"testing"

	"cgtun/internal/labtest"
)

// clientEnv makes the test binary the client, which runs in a cgroup of its own.
const clientEnv = "CGTUN_SURVIVAL_CLIENT"

func TestMain(m *testing.M) {
	if text := os.Getenv(clientEnv); text != "" {
		var c client
		err := json.Unmarshal([]byte(text), &c)
		if err == nil {
			err = c.run()
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "client:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	// A run waits for nearly all of its time.
	_ = flag.Set("test.parallel", "6")
	flag.Parse()
	labtest.Main(m)
}
