package uring

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// possibleCPUs is how many queues the kernel has for a connection: one for each CPU that could ever come up, whether it
// is there now or not (fuse_uring_create in fs/fuse/dev_uring.c).
func possibleCPUs() (int, error) {
	const path = "/sys/devices/system/cpu/possible"
	list, err := os.ReadFile(path)
	if err != nil {
		return 0, fmt.Errorf("%w: how many CPUs may there be? %w", ErrNotSupported, err)
	}
	n, err := countCPUs(strings.TrimSpace(string(list)))
	if err != nil {
		return 0, fmt.Errorf("%w: %s: %w", ErrNotSupported, path, err)
	}
	return n, nil
}

// countCPUs counts the members of a list such as "0-3,8".
func countCPUs(list string) (int, error) {
	n := 0
	for part := range strings.SplitSeq(list, ",") {
		from, to, ranged := strings.Cut(part, "-")
		first, err := strconv.ParseUint(from, 10, 16)
		last := first
		if err == nil && ranged {
			last, err = strconv.ParseUint(to, 10, 16)
		}
		if err != nil || last < first {
			return 0, fmt.Errorf("%q is no list of CPUs", list)
		}
		n += int(last-first) + 1
	}
	return n, nil
}

// usableCPUs are those that threads of this process may run on now: its cpuset's, and online.
func usableCPUs() (unix.CPUSet, error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(os.Getpid(), &set); err != nil {
		return set, fmt.Errorf("%w: sched_getaffinity: %w", ErrNotSupported, err)
	}
	return set, nil
}

// pin keeps the calling thread, which must be locked, on one CPU. Where that fails, because the CPU has left the cpuset or
// gone offline meanwhile, the thread stays free to run where it may: its queue is then served from elsewhere.
func pin(cpu int) {
	var set unix.CPUSet
	set.Set(cpu)
	_ = unix.SchedSetaffinity(0, &set)
}

// unpin lets the calling thread, which must be locked, run wherever the process may.
func unpin() bool {
	set, err := usableCPUs()
	return err == nil && unix.SchedSetaffinity(0, &set) == nil
}

// yieldToWakers makes the calling thread one that does not interrupt whoever wakes it (SCHED_BATCH). Most who do are about
// to wait for it. Who does not, because he closed a file or the kernel reads ahead for him, goes on, and what he has left
// behind is done together with what he next waits for.
func yieldToWakers() {
	_ = unix.SchedSetAttr(0, &unix.SchedAttr{Policy: unix.SCHED_BATCH}, 0)
}
