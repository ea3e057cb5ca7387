package traffic

import (
	"os"
	"strconv"
	"strings"
	"time"
)

// busy is how long the machine's CPUs have worked since it started: all of /proc/stat but idle, iowait and steal.
func busy() time.Duration {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0
	}
	line, _, _ := strings.Cut(string(b), "\n")
	var sum uint64
	for i, f := range strings.Fields(line) {
		switch i {
		case 1, 2, 3, 6, 7: // user, nice, system, irq, softirq
			n, _ := strconv.ParseUint(f, 10, 64)
			sum += n
		}
	}
	return time.Duration(sum) * time.Second / 100 // USER_HZ
}
