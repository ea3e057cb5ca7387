package uring

import (
	"fmt"
	"strings"
	"testing"
)

func TestCountCPUs(t *testing.T) {
	for list, want := range map[string]int{"0": 1, "0-1": 2, "0-3,8": 5, "0,2,4-7": 6, "5-5": 1, "0-65535": 65536} {
		if n, err := countCPUs(list); err != nil || n != want {
			t.Errorf("%q: %d, %v; want %d", list, n, err, want)
		}
	}
	for _, list := range []string{"", "-", "a", "1-", "-1", "3-1", "0,,1", "0-1,", "0-1-2", " 0", "65536", "0-99999999999999999999", "0x1"} {
		if n, err := countCPUs(list); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("%q", list)) {
			t.Errorf("%q: %d, %v; want an error that quotes it", list, n, err)
		}
	}
}

func FuzzCountCPUs(f *testing.F) {
	for _, s := range []string{"", "0", "0-3,8", "1-", ",", "65535-65535,0-65535"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, list string) {
		n, err := countCPUs(list)
		if err != nil {
			if n != 0 {
				t.Errorf("%q: %d with %v", list, n, err)
			}
			return
		}
		if parts := strings.Count(list, ",") + 1; n < parts || n > parts<<16 {
			t.Errorf("%q: %d CPUs in %d ranges", list, n, parts)
		}
	})
}
