// Package metrics shows the mounts of a machine to Prometheus: one target for all servers, which knows no more than
// "lamina status" does.
//
// Every collection asks the servers anew. Nothing is kept between two of them, so that a mount that is gone is gone from
// the answer too.
package metrics

import (
	"runtime"
	"strconv"

	"lamina/inventory"
	"lamina/metrics/exporter"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/procfs"
)

// ofMount are the labels that tell mounts apart. Several can lie on one directory; device numbers are unique.
var ofMount = []string{"mountpoint", "device"}

func mountMetric(name string, kind prometheus.ValueType, help string, more ...string) exporter.Metric {
	return exporter.Metric{Name: "lamina_" + name, Type: kind, Labels: append(append([]string{}, ofMount...), more...), Help: help}
}

const (
	counter = exporter.Counter
	gauge   = exporter.Gauge
)

// The metrics, in the order of the documentation.
var (
	buildInfo   = exporter.NewGauge("lamina_build_info", "1; the exporter's version.", "version", "goversion")
	mounts      = exporter.NewGauge("lamina_mounts", "Mounts whose servers answered.")
	unreachable = exporter.NewGauge("lamina_gather_failed", "1 if some server or some engine's list could not be read; the exporter's log names it.")

	mountInfo = mountMetric("mount_info", gauge, "1; what the mount is and whose.", "pid", "version", "transport", "passthrough", "format", "engine", "namespace", "container", "name")
	started   = mountMetric("mount_start_time_seconds", gauge, "When it was mounted, in seconds since 1970.")
	flushing  = mountMetric("mount_flushing", gauge, "1 if it is unmounted, and its server still writes what is left.")
	degraded  = mountMetric("mount_degraded", gauge, "1 if the mount does without transport=uring or without passthrough, although it was to have it.", "what")

	requests = mountMetric("requests_total", counter, "Requests of the kernel.", "op")
	read     = mountMetric("read_bytes_total", counter, "Bytes read through the server. What is passed through is not counted.")
	written  = mountMetric("written_bytes_total", counter, "Bytes written through the server. What is passed through is not counted.")
	opens    = mountMetric("opens_total", counter, "Opens, by how the file's bytes are reached: passthrough or cached.", "how")
	detached = mountMetric("detached_files_total", counter, "Files that were written while readers were passed through to the lower file.")
	errs     = mountMetric("errors_total", counter, "Failed requests (EIO), copies and syncs; damage found.")
	damaged  = mountMetric("damaged_files", gauge, "Files that could not be trusted when they were looked at.")

	notCopied = mountMetric("not_copied_bytes", gauge, "Bytes of lower files that were not copied because files were not copied up whole.")
	copied    = mountMetric("copied_bytes_total", counter, "Bytes that the copier has fetched from lower files.")
	created   = mountMetric("sketches_created_total", counter, "Files that were copied up without their data.")
	completed = mountMetric("sketches_completed_total", counter, "Sketches that became ordinary files.")
	sketches  = mountMetric("sketches", gauge, "Open sketches.")
	blocks    = mountMetric("blocks", gauge, "Blocks of the open sketches, by state: lower, in_transit or upper.", "state")
	queue     = mountMetric("copy_queue_files", gauge, "Files that wait for the copier.")
	settling  = mountMetric("settling_files", gauge, "Closed files whose tables are not on disk yet.")
	openFiles = mountMetric("open_files", gauge, "Open descriptors on the mount.")
	nodes     = mountMetric("nodes", gauge, "Files and directories that the kernel remembers.")

	serverMounts = serverMetric("server_mounts", gauge, "Mounts that the process serves.")
	serverCPU    = serverMetric("server_cpu_seconds_total", counter, "Processor time of the server process, user and system.")
	serverMemory = serverMetric("server_resident_memory_bytes", gauge, "Resident memory of the server process.")
	serverFDs    = serverMetric("server_open_fds", gauge, "Descriptors of the server process.")
	serverThread = serverMetric("server_threads", gauge, "Threads of the server process.")
)

func serverMetric(name string, kind prometheus.ValueType, help string) exporter.Metric {
	return exporter.Metric{Name: "lamina_" + name, Type: kind, Labels: []string{"pid"}, Help: help}
}

// All lists every metric of Lamina's own. The exporter shows those of its own process and of the Go runtime as well.
var All = []exporter.Metric{
	buildInfo, mounts, unreachable,
	mountInfo, started, flushing, degraded,
	requests, read, written, opens, detached, errs, damaged,
	notCopied, copied, created, completed, sketches, blocks, queue, settling, openFiles, nodes,
	serverMounts, serverCPU, serverMemory, serverFDs, serverThread,
}

// Collector asks for the mounts at every collection.
type Collector struct {
	// Mounts lists them, and what failed.
	Mounts func() ([]inventory.Mount, error)
	// Failed is told what Mounts failed at.
	Failed func(error)
	// Version is the exporter's.
	Version string

	descs exporter.Descs
}

// New makes a collector of all mounts of this user.
func New(version string, failed func(error)) *Collector {
	c := &Collector{Version: version, Failed: failed, descs: exporter.NewDescs(All)}
	c.Mounts = func() ([]inventory.Mount, error) { return inventory.Mounts("") }
	return c
}

var _ prometheus.Collector = (*Collector)(nil)

// Describe implements prometheus.Collector.
func (c *Collector) Describe(ch chan<- *prometheus.Desc) { c.descs.Describe(ch) }

// Collect implements prometheus.Collector.
func (c *Collector) Collect(ch chan<- prometheus.Metric) {
	put := c.descs.Putter(ch)
	all, err := c.Mounts()
	if err != nil {
		c.Failed(err)
	}
	put(buildInfo, 1, c.Version, runtime.Version())
	put(mounts, float64(len(all)))
	put(unreachable, exporter.Number(err != nil))
	servers := map[int]server{}
	seen := map[string]bool{}
	for i := range all {
		s := &all[i]
		if seen[s.Mountpoint+"\x00"+s.Device] { // never twice in one answer, or Prometheus gets none
			continue
		}
		seen[s.Mountpoint+"\x00"+s.Device] = true
		servers[s.PID] = server{servers[s.PID].mounts + 1, s.Descriptors}
		collectMount(s, put)
	}
	for pid, s := range servers {
		collectServer(pid, s, put)
	}
}

func collectMount(s *inventory.Mount, put exporter.Putter) {
	one := func(m exporter.Metric, v float64, more ...string) {
		put(m, v, append([]string{s.Mountpoint, s.Device}, more...)...)
	}
	var c inventory.Container
	if s.Container != nil {
		c = *s.Container
	}
	one(mountInfo, 1, strconv.Itoa(s.PID), s.Version, s.Transport, s.Passthrough, s.Format, c.Engine, c.Namespace, c.ID, c.Name)
	one(started, float64(s.Started.UnixNano())/1e9)
	one(flushing, exporter.Number(s.Flushing))
	one(degraded, exporter.Number(s.TransportReason != ""), "transport")
	one(degraded, exporter.Number(s.PassthroughReason != ""), "passthrough")

	for op, n := range s.FUSE.Requests {
		one(requests, float64(n), op)
	}
	one(read, float64(s.FUSE.BytesRead))
	one(written, float64(s.FUSE.BytesWritten))
	one(opens, float64(s.FUSE.PassedOpens), "passthrough")
	one(opens, float64(s.FUSE.CachedOpens), "cached")
	one(detached, float64(s.FUSE.Detached))
	one(errs, float64(s.Errors))
	one(damaged, float64(s.Damaged))

	one(notCopied, float64(s.BytesNotCopied))
	one(copied, float64(s.BytesCopied))
	one(created, float64(s.SketchesCreated))
	one(completed, float64(s.SketchesComplete))
	one(sketches, float64(s.Sketches))
	one(blocks, float64(s.Blocks.Lower), "lower")
	one(blocks, float64(s.Blocks.InTransit), "in_transit")
	one(blocks, float64(s.Blocks.Upper), "upper")
	one(queue, float64(s.Queue))
	one(settling, float64(s.Settling))
	one(openFiles, float64(s.OpenFiles))
	one(nodes, float64(s.FUSE.Nodes))
}

type server struct{ mounts, descriptors int }

// collectServer reads a server's process from /proc, as far as everybody may. One that has ended meanwhile is left out.
func collectServer(pid int, s server, put exporter.Putter) {
	label := strconv.Itoa(pid)
	put(serverMounts, float64(s.mounts), label)
	put(serverFDs, float64(s.descriptors), label)
	p, err := procfs.NewProc(pid)
	if err != nil {
		return
	}
	if st, err := p.Stat(); err == nil {
		put(serverCPU, st.CPUTime(), label)
		put(serverMemory, float64(st.ResidentMemory()), label)
		put(serverThread, float64(st.NumThreads), label)
	}
}
