package peers

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"
)

// File is a source that is a text file: a line for each node with the prefix of its pods, its address and, if it is not the
// usual one, the MAC of its VXLAN device. What follows a # is a comment. The same file serves all nodes.
//
//	10.244.1.0/24  192.168.0.1
//	10.244.2.0/24  192.168.0.2  0e:6c:c0:a8:00:02
//
// The file is watched, also when it is replaced or missing.
type File string

// Read reads the file. An error names the line.
func (f File) Read() ([]Lease, error) {
	b, err := os.ReadFile(string(f))
	if err != nil {
		return nil, fmt.Errorf("peers file: %w", err)
	}
	return f.parse(b)
}

func (f File) parse(b []byte) ([]Lease, error) {
	leases := []Lease{}
	n := 0
	for line := range bytes.Lines(b) {
		n++
		text, _, _ := strings.Cut(string(line), "#")
		fields := strings.Fields(text)
		if len(fields) == 0 {
			continue
		}
		l, err := parseLine(fields)
		if err != nil {
			return nil, fmt.Errorf("%s:%d: %w", string(f), n, err)
		}
		leases = append(leases, l)
	}
	return leases, nil
}

func parseLine(fields []string) (l Lease, err error) {
	if len(fields) != 2 && len(fields) != 3 {
		return l, fmt.Errorf("%q: a line is PREFIX NODE [MAC], such as 10.244.1.0/24 192.168.0.1", strings.Join(fields, " "))
	}
	if l.Prefix, err = netip.ParsePrefix(fields[0]); err != nil {
		return l, fmt.Errorf("%q is not a prefix such as 10.244.1.0/24", fields[0])
	}
	if l.Node, err = netip.ParseAddr(fields[1]); err != nil {
		return l, fmt.Errorf("%q is not an address such as 192.168.0.1", fields[1])
	}
	if len(fields) == 3 {
		if l.MAC, err = ParseMAC(fields[2]); err != nil {
			return l, err
		}
	}
	return l, l.check()
}

// settle is how long a file must be left alone before it is read: an editor that writes in place makes several events.
const settle = 20 * time.Millisecond

// Watch reads the file now and after each change.
func (f File) Watch(ctx context.Context) (<-chan Update, error) {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, fmt.Errorf("peers file %s: watching: %w", string(f), err)
	}
	// The directory, because a file that is replaced by a rename is another inode.
	if err := w.Add(filepath.Dir(string(f))); err != nil {
		w.Close()
		return nil, fmt.Errorf("peers file %s: watching its directory: %w", string(f), err)
	}
	out := make(chan Update, 1)
	go func() {
		defer close(out)
		defer w.Close()
		f.watch(ctx, w, out)
	}()
	return out, nil
}

func (f File) watch(ctx context.Context, w *fsnotify.Watcher, out chan Update) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	pending := true // events of others in the directory must not put off the reading for ever
	for {
		select {
		case <-ctx.Done():
			return
		case <-w.Events: // of any file: a link that Kubernetes' ConfigMaps turn has another name
		case <-w.Errors: // events were lost
		case <-timer.C:
			pending = false
			leases, err := f.Read()
			Send(out, Update{leases, err})
			continue
		}
		if !pending {
			pending = true
			timer.Reset(settle)
		}
	}
}

// Send replaces what is in the channel, of capacity one and with one sender, by u.
func Send(out chan Update, u Update) {
	select {
	case <-out:
	default:
	}
	out <- u
}
