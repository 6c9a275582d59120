package config

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
)

// Size is a number of bytes.
type Size int64

// units from the largest, so that String finds the shortest form.
var units = []struct {
	name  string
	bytes int64
}{
	{"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10},
	{"TB", 1e12}, {"GB", 1e9}, {"MB", 1e6}, {"kB", 1e3}, {"B", 1},
}

// UnmarshalTOML takes an integer with a unit, such as "256MiB" or "1GB".
func (s *Size) UnmarshalTOML(v any) error {
	const allowed = `allowed: an integer with one of B, kB, MB, GB, TB, KiB, MiB, GiB, TiB, such as "256MiB"`
	text, ok := v.(string)
	if !ok {
		return errors.New("is not text; " + allowed)
	}
	for _, unit := range units {
		digits, ok := strings.CutSuffix(text, unit.name)
		if !ok {
			continue
		}
		n, err := strconv.ParseInt(strings.TrimSpace(digits), 10, 64)
		if err != nil || n < 0 || n > math.MaxInt64/unit.bytes {
			break
		}
		*s = Size(n * unit.bytes)
		return nil
	}
	return fmt.Errorf("%.60q is not a size; %s", text, allowed)
}

// String returns the size in the largest binary unit that divides it.
func (s Size) String() string {
	for _, unit := range units[:4] {
		if s != 0 && int64(s)%unit.bytes == 0 {
			return fmt.Sprintf("%d%s", int64(s)/unit.bytes, unit.name)
		}
	}
	return fmt.Sprintf("%dB", int64(s))
}

// MarshalText is String: a file can be written as it was read.
func (s Size) MarshalText() ([]byte, error) { return []byte(s.String()), nil }
