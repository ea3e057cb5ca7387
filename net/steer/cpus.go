package steer

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
)

// cpuSet is CPUs by number, ascending.
type cpuSet []int

// mask is a set as sysfs takes it: hexadecimal, 32 CPUs a group.
func (s cpuSet) mask() string {
	groups := []uint32{0}
	for _, cpu := range s {
		for cpu/32 >= len(groups) {
			groups = append(groups, 0)
		}
		groups[cpu/32] |= 1 << (cpu % 32)
	}
	var b strings.Builder
	for i, g := range slices.Backward(groups) {
		if i == len(groups)-1 {
			fmt.Fprintf(&b, "%x", g)
		} else {
			fmt.Fprintf(&b, ",%08x", g)
		}
	}
	return b.String()
}

func parseMask(mask string) (s cpuSet, err error) {
	groups := strings.Split(strings.TrimSpace(mask), ",")
	for i, g := range slices.Backward(groups) {
		bits, err := strconv.ParseUint(g, 16, 32)
		if err != nil {
			return nil, fmt.Errorf("CPU mask %q: %w", mask, err)
		}
		for bit := range 32 {
			if bits>>bit&1 != 0 {
				s = append(s, (len(groups)-1-i)*32+bit)
			}
		}
	}
	return s, nil
}

// cpu is what a CPU has been doing.
type cpu struct {
	number      int
	busy, total uint64 // since boot, in the unit of /proc/stat
	receiving   uint64 // the part of busy that was in interrupts, hard and soft
	squeezes    uint64 // how often it has left packets for later, since boot
	empty       bool   // nothing waits in its queue of received packets
}

// sample is the CPUs that are online, by number, at one moment.
type sample []cpu

func (s sample) set() (all cpuSet) {
	for _, c := range s {
		all = append(all, c.number)
	}
	return all
}

// readSample looks at the queues after it was called.
func readSample() (sample, error) {
	softnet, err := os.ReadFile("/proc/net/softnet_stat")
	if err != nil {
		return nil, err
	}
	stat, err := os.ReadFile("/proc/stat")
	if err != nil {
		return nil, err
	}
	return parseSample(softnet, stat)
}

func parseSample(softnet, stat []byte) (s sample, err error) {
	for line := range bytes.Lines(softnet) {
		const squeezes, number, input, process, fields = 2, 12, 13, 14, 15 // since Linux 5.14
		f := strings.Fields(string(line))
		if len(f) < fields {
			return nil, fmt.Errorf("/proc/net/softnet_stat: %d fields, not %d", len(f), fields)
		}
		n, err := strconv.ParseUint(f[number], 16, 32)
		if err != nil {
			return nil, fmt.Errorf("/proc/net/softnet_stat: %w", err)
		}
		times, err := strconv.ParseUint(f[squeezes], 16, 64)
		if err != nil {
			return nil, fmt.Errorf("/proc/net/softnet_stat: %w", err)
		}
		zero := func(s string) bool { return strings.Trim(s, "0") == "" }
		s = append(s, cpu{number: int(n), squeezes: times, empty: zero(f[input]) && zero(f[process])})
	}
	for line := range bytes.Lines(stat) {
		f := strings.Fields(string(line))
		if len(f) < 9 || !strings.HasPrefix(f[0], "cpu") || f[0] == "cpu" {
			continue
		}
		n, err := strconv.Atoi(f[0][3:])
		if err != nil {
			return nil, fmt.Errorf("/proc/stat: %w", err)
		}
		i := slices.IndexFunc(s, func(c cpu) bool { return c.number == n })
		if i < 0 {
			continue // has come this moment
		}
		for at, v := range f[1:9] { // user nice system idle iowait irq softirq steal
			const idle, iowait, irq, softirq = 3, 4, 5, 6
			ticks, err := strconv.ParseUint(v, 10, 64)
			if err != nil {
				return nil, fmt.Errorf("/proc/stat: %w", err)
			}
			s[i].total += ticks
			if at != idle && at != iowait {
				s[i].busy += ticks
			}
			if at == irq || at == softirq {
				s[i].receiving += ticks
			}
		}
	}
	return s, nil
}
