package attach_test

import (
	"fmt"
	"os"
	"testing"

	"cgtun/internal/labtest"
)

// holderEnv makes the test binary the process that holds sockets: see
// holder_test.go.
const holderEnv = "CGTUN_ATTACH_HOLDER"

func TestMain(m *testing.M) {
	if os.Getenv(holderEnv) != "" {
		if err := hold(); err != nil {
			fmt.Println("holder:", err)
			os.Exit(1)
		}
		return
	}
	labtest.Main(m)
}
