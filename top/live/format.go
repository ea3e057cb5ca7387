package live

import (
	"fmt"
	"strings"
	"unicode"
)

// Printable makes a name harmless for a terminal.
func Printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, s)
}

// Count shows a number in at most seven characters.
func Count(f float64) string {
	switch {
	case f == 0:
		return "0"
	case f < 10:
		return fmt.Sprintf("%.1f", f)
	case f < 1e5:
		return fmt.Sprintf("%.0f", f)
	}
	return scaled(f, 1000, []string{"k", "M", "G", "T"})
}

// Size shows a number of bytes in at most seven characters.
func Size(f float64) string {
	if f < 1024 {
		return fmt.Sprintf("%.0f", f)
	}
	return scaled(f, 1024, []string{"K", "M", "G", "T", "P"})
}

func scaled(f, step float64, units []string) string {
	i := -1
	for i < len(units)-1 && (i < 0 || f >= step) {
		f, i = f/step, i+1
	}
	if f < 10 {
		return fmt.Sprintf("%.1f%s", f, units[i])
	}
	return fmt.Sprintf("%.0f%s", f, units[i])
}

// Rate is that of a counter, by second; one that began again has none.
func Rate(before, now uint64, seconds float64) float64 {
	if now < before || seconds <= 0 {
		return 0
	}
	return float64(now-before) / seconds
}
