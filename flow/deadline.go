package flow

import (
	"errors"
	"os"
	"time"
)

// Past is a deadline that has passed: it wakes who waits at a conn, which stays
// usable.
var Past = time.Unix(1, 0)

// IsDeadline tells the error of who was woken by a deadline from those of a conn.
func IsDeadline(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }
