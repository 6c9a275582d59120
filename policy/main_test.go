package policy_test

import (
	"testing"

	"cgtun/internal/labtest"
)

func TestMain(m *testing.M) { labtest.Main(m) }
