package config

// nearest returns the known key that is most like key, "" if none is alike
// enough to be what was meant: more than a third of its letters differ.
func nearest(key string, known []string) string {
	if len(key) > 64 {
		return ""
	}
	best, least := "", max(1, len(key)/3)
	for _, k := range known {
		d := distance(key, k)
		if d >= len(k) || d > least || d == least && best != "" && alike(key, k) <= alike(key, best) {
			continue
		}
		best, least = k, d
	}
	return best
}

// alike counts the letters with which both begin.
func alike(a, b string) (n int) {
	for n < min(len(a), len(b)) && a[n] == b[n] {
		n++
	}
	return n
}

// distance counts the letters to be put in, taken out, changed or swapped with
// their neighbour to make b of a (optimal string alignment).
func distance(a, b string) int {
	before, row, next := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		next[0] = i
		for j := 1; j <= len(b); j++ {
			change := row[j-1]
			if a[i-1] != b[j-1] {
				change++
			}
			next[j] = min(row[j]+1, next[j-1]+1, change)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				next[j] = min(next[j], before[j-2]+1)
			}
		}
		before, row, next = row, next, before
	}
	return row[len(b)]
}
