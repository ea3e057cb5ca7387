package fusefs

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"lamina/uring"

	"golang.org/x/sys/unix"
)

// Status is what a mount tells about itself.
type Status struct {
	Mountpoint string `json:"mountpoint"`
	// Transport is uring or dev; Reason says why it is dev although the mount would have liked uring, and is empty otherwise.
	Transport       string `json:"transport"`
	TransportReason string `json:"transport_reason,omitempty"`
	// Rings is nil on /dev/fuse.
	Rings    *uring.Stats `json:"rings,omitempty"`
	ReadOnly bool         `json:"read_only"`
	// Passthrough is auto, on or off; Reason says why it is off, or what failed, and is empty otherwise.
	Passthrough       string `json:"passthrough"`
	PassthroughReason string `json:"passthrough_reason,omitempty"`
	// OpenFiles counts descriptors; PassedOpens and CachedOpens count opens since the mount began.
	OpenFiles   int    `json:"open_files"`
	PassedOpens uint64 `json:"passed_opens"`
	CachedOpens uint64 `json:"cached_opens"`
	// Detached counts files that were written while readers were passed through to the lower file.
	Detached uint64 `json:"detached"`
	// Nodes are those that the kernel or an unfinished file holds.
	Nodes int `json:"nodes"`
	// BytesRead and BytesWritten came through the server; what is passed through does not.
	BytesRead    uint64 `json:"bytes_read"`
	BytesWritten uint64 `json:"bytes_written"`
	// Requests by kind; Errors are those answered with EIO.
	Requests map[string]uint64 `json:"requests"`
	Errors   uint64            `json:"errors"`
	// Survive: the mount outlives its server. TakeOvers is how often one took over from another.
	Survive   bool   `json:"survive"`
	TakeOvers uint64 `json:"take_overs"`
}

// Status may be called at any time.
func (s *Server) Status() Status {
	srv := s.srv
	mode, reason := srv.pass.describe()
	transportReason := ""
	if err := s.dev.fallback(); err != nil {
		transportReason = err.Error()
	}
	return Status{
		Survive:           srv.opt.Survive != nil,
		TakeOvers:         s.takeOvers,
		Mountpoint:        s.mnt,
		TransportReason:   transportReason,
		Transport:         s.dev.name(),
		Rings:             s.dev.rings(),
		ReadOnly:          srv.opt.ReadOnly,
		Passthrough:       mode,
		PassthroughReason: reason,
		OpenFiles:         srv.handles.open(),
		PassedOpens:       srv.stats.passed.Load(),
		CachedOpens:       srv.stats.cached.Load(),
		Detached:          srv.stats.detached.Load(),
		Nodes:             srv.fs.Live(),
		BytesRead:         srv.stats.read.Load(),
		BytesWritten:      srv.stats.written.Load(),
		Requests:          srv.stats.requests(),
		Errors:            srv.errors.Load(),
	}
}

// op is a kind of request, for counting.
type op uint8

const (
	opLookup op = iota
	opForget
	opGetattr
	opSetattr
	opOpen
	opRelease
	opRead
	opWrite
	opCreate
	opLink
	opUnlink
	opRename
	opReadlink
	opReaddir
	opXattr
	opFsync
	opFallocate
	opLseek
	opCopy
	opStatfs
	numOps
)

var opNames = [numOps]string{"lookup", "forget", "getattr", "setattr", "open", "release", "read", "write", "create", "link",
	"unlink", "rename", "readlink", "readdir", "xattr", "fsync", "fallocate", "lseek", "copy_file_range", "statfs"}

type counters struct {
	ops                      [numOps]atomic.Uint64
	passed, cached, detached atomic.Uint64
	read, written            atomic.Uint64 // bytes
}

func (c *counters) count(o op) { c.ops[o].Add(1) }

func (c *counters) requests() map[string]uint64 {
	out := make(map[string]uint64, numOps)
	for i := range c.ops {
		if n := c.ops[i].Load(); n > 0 {
			out[opNames[i]] = n
		}
	}
	return out
}

// passthroughState remembers whether passthrough works, and why not.
type passthroughState struct {
	opt *Options
	off atomic.Bool

	mu     sync.Mutex
	reason string
}

func (p *passthroughState) init(opt *Options) {
	p.opt = opt
	if opt.Passthrough == PassthroughOff {
		p.off.Store(true)
	} else if opt.NoPassthrough != "" {
		p.disable(opt.NoPassthrough)
	}
}

func (p *passthroughState) enabled() bool { return !p.off.Load() }

// disable turns passthrough off for the mount.
func (p *passthroughState) disable(reason string) {
	p.off.Store(true)
	p.report(reason)
}

// NeedsPrivileges says why passthrough is off, and what would help.
const NeedsPrivileges = "registering a backing file needs CAP_SYS_ADMIN in the initial user namespace: mount as root there"

// failed judges a backing file that could not be registered. The file is then opened cached.
func (p *passthroughState) failed(err error) {
	switch {
	case errors.Is(err, unix.EPERM):
		p.disable(NeedsPrivileges)
	case errors.Is(err, unix.ELOOP):
		p.report(fmt.Sprintf("a layer lies on a stacked filesystem and max_stack_depth is %d: mount with max_stack_depth=2, or keep the layers on a plain filesystem", p.opt.MaxStackDepth))
	default:
		p.report(fmt.Sprintf("registering a backing file failed: %v", err))
	}
}

// report logs a reason when it is news.
func (p *passthroughState) report(reason string) {
	p.mu.Lock()
	news := p.reason != reason
	p.reason = reason
	p.mu.Unlock()
	if news {
		p.opt.Logf("passthrough: %s", reason)
	}
}

func (p *passthroughState) describe() (mode, reason string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.enabled() {
		return PassthroughOff.String(), p.reason
	}
	return p.opt.Passthrough.String(), p.reason
}
