package pool

import (
	"fmt"
	"os"
	"testing"
)

func TestLockPID(t *testing.T) {
	const locks = "1: POSIX  ADVISORY  WRITE 7 08:02:131 0 EOF\n2: FLOCK  ADVISORY  WRITE 12 08:02:1310 0 EOF\n" +
		"3: FLOCK  ADVISORY  READ 34 08:02:131 0 EOF\n3: -> FLOCK  ADVISORY  WRITE 56 08:02:131 0 EOF\n"
	own := fmt.Sprintf("4: FLOCK  ADVISORY  WRITE %d 08:02:7 0 EOF\n", os.Getpid())
	for id, want := range map[string]int{"08:02:131": 34, "08:02:1310": 12, "08:02:13": 0, "08:02:7": os.Getpid()} {
		if got := lockPID(locks+own, id); got != want {
			t.Errorf("%s: %d, want %d", id, got, want)
		}
	}
}
