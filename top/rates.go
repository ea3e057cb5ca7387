// Package top shows what all mounts are doing now: a row a mount, in a terminal, as text or as JSON.
package top

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"lamina/inventory"
	"lamina/top/live"
)

// Row is what one mount did in an interval. Rates are by second.
type Row struct {
	Mountpoint string               `json:"mountpoint"`
	Device     string               `json:"device"`
	PID        int                  `json:"pid"`
	Container  *inventory.Container `json:"container,omitempty"`
	Flushing   bool                 `json:"flushing"`

	Requests  float64 `json:"requests_per_second"`
	Read      float64 `json:"read_bytes_per_second"` // through the server, as Written is
	Written   float64 `json:"written_bytes_per_second"`
	Copied    float64 `json:"copied_bytes_per_second"` // by the copier
	Errors    float64 `json:"errors_per_second"`
	NotCopied int64   `json:"not_copied_bytes"` // since the mount began
	InTransit int64   `json:"blocks_in_transit"`
	Queue     int64   `json:"copy_queue_files"`
	AllErrors uint64  `json:"errors"`
	Damaged   int64   `json:"damaged_files"`
}

// Sampler makes rates of what servers count.
type Sampler struct {
	at   time.Time
	last map[string]inventory.Mount
}

// Next takes a sample and returns what happened since the one before. A mount that is new has no rates yet.
func (s *Sampler) Next(at time.Time, mounts []inventory.Mount) []Row {
	seconds := at.Sub(s.at).Seconds()
	seen := make(map[string]inventory.Mount, len(mounts))
	rows := make([]Row, 0, len(mounts))
	for _, m := range mounts {
		key := fmt.Sprint(m.Mountpoint, "\x00", m.Device, "\x00", m.Started.UnixNano())
		seen[key] = m
		r := Row{Mountpoint: m.Mountpoint, Device: m.Device, PID: m.PID, Container: m.Container, Flushing: m.Flushing, NotCopied: m.BytesNotCopied,
			InTransit: m.Blocks.InTransit, Queue: m.Queue, AllErrors: m.Errors, Damaged: m.Damaged}
		if before, known := s.last[key]; known && seconds > 0 {
			r.Requests = live.Rate(requests(&before), requests(&m), seconds)
			r.Read = live.Rate(before.FUSE.BytesRead, m.FUSE.BytesRead, seconds)
			r.Written = live.Rate(before.FUSE.BytesWritten, m.FUSE.BytesWritten, seconds)
			r.Copied = live.Rate(uint64(before.BytesCopied), uint64(m.BytesCopied), seconds)
			r.Errors = live.Rate(before.Errors, m.Errors, seconds)
		}
		rows = append(rows, r)
	}
	s.at, s.last = at, seen
	return rows
}

// Key is what rows are sorted by.
type Key int

// The keys, and the letter that chooses each.
const (
	ByMount     Key = iota // m
	ByContainer            // c
	ByRequests             // o
	ByRead                 // r
	ByWritten              // w
	ByAvoided              // a
	ByCopied               // y
	ByTransit              // t
	ByQueue                // u
	ByErrors               // e
)

var keyNames = []string{"mount", "container", "requests", "read", "written", "avoided", "copied", "transit", "queue", "errors"}

const keyLetters = "mcorwaytue"

func (k Key) String() string { return keyNames[k] }

// ParseKey knows a key by its name.
func ParseKey(name string) (Key, error) {
	if i := slices.Index(keyNames, name); i >= 0 {
		return Key(i), nil
	}
	return 0, fmt.Errorf("sort key %q: use one of %s", name, strings.Join(keyNames, ", "))
}

// Sort orders rows: names upwards, figures downwards; reverse turns that round. Equal rows are in the order of their mounts.
func Sort(rows []Row, by Key, reverse bool) {
	slices.SortStableFunc(rows, func(a, b Row) int {
		return cmp.Or(cmp.Compare(a.Mountpoint, b.Mountpoint), cmp.Compare(a.Device, b.Device))
	})
	figures := map[Key]func(*Row) float64{
		ByRequests: func(r *Row) float64 { return r.Requests },
		ByRead:     func(r *Row) float64 { return r.Read },
		ByWritten:  func(r *Row) float64 { return r.Written },
		ByAvoided:  func(r *Row) float64 { return float64(r.NotCopied) },
		ByCopied:   func(r *Row) float64 { return r.Copied },
		ByTransit:  func(r *Row) float64 { return float64(r.InTransit) },
		ByQueue:    func(r *Row) float64 { return float64(r.Queue) },
		ByErrors:   func(r *Row) float64 { return r.Errors + float64(r.AllErrors)/1e12 }, // those of now first
	}
	slices.SortStableFunc(rows, func(a, b Row) int {
		var order int
		switch f := figures[by]; {
		case f != nil:
			order = cmp.Compare(f(&b), f(&a))
		case by == ByContainer:
			order = cmp.Compare(a.Container.String(), b.Container.String())
		default:
			order = cmp.Compare(a.Mountpoint, b.Mountpoint)
		}
		if reverse {
			return -order
		}
		return order
	})
}

// requests counts those of every kind.
func requests(m *inventory.Mount) uint64 {
	var n uint64
	for _, k := range m.FUSE.Requests {
		n += k
	}
	return n
}
