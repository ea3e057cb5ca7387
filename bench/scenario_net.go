package bench

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"lamina/bench/pair"
	"lamina/bench/report"
	"lamina/net/lab/traffic"
)

func netScenario(name, title, describes string, f func(n *nets) error, tools ...Tool) Scenario {
	return Scenario{
		Name: name, Title: title, Describes: describes, Contenders: netNames(), Tools: slices.Concat(netTools, tools),
		Space: func(Mode) int64 { return 64 * mib }, Weight: 1, Run: func(l *Lab) error { return l.withNets(f) },
	}
}

var netTCP = netScenario("net-tcp-rr", "TCP: one byte there, one back",
	"Two hosts are network namespaces joined by a veth pair as the cable. Over one TCP connection a byte goes there and one comes back, as often as "+
		"it can (netperf's TCP_RR). Client and server are threads with blocking sockets, one on the first CPU and one on the last.",
	func(n *nets) error {
		m, cpu, err := n.measureTraffic(traffic.Run{Kind: traffic.TCPRR}, report.PerSecond)
		if err == nil {
			m.ofHost("TCP_RR", 0.93)
			m.ofBridge("TCP_RR", 1.2)
			m.routedOfBridge("TCP_RR", 1)
			cpu.cpuOfHost("TCP_RR")
		}
		return err
	})

func (m *Metric) cpuOfHost(what string) {
	m.RatioAtMost("x the host network's CPU time a transaction: "+what, Of{fastPath, ""}, Of{onHosts, ""}, 1.1)
}

var netUDP = netScenario("net-udp-rr", "UDP: one byte there, one back", "The same with datagrams (UDP_RR).",
	func(n *nets) error {
		m, cpu, err := n.measureTraffic(traffic.Run{Kind: traffic.UDPRR}, report.PerSecond)
		if err == nil {
			m.ofHost("UDP_RR", 0.93)
			m.ofBridge("UDP_RR", 1.2)
			m.routedOfBridge("UDP_RR", 1)
			cpu.cpuOfHost("UDP_RR")
		}
		return err
	})

var netFlows = netScenario("net-udp-rr-16", "UDP: the same, 16 flows at once",
	"Sixteen clients, each a thread with a flow of its own, and one server: published prototypes of the fast path collapse here.",
	func(n *nets) error {
		m, _, err := n.measureTraffic(traffic.Run{Kind: traffic.UDPRR, Flows: 16}, report.PerSecond)
		if err == nil {
			m.ofBridge("UDP_RR, 16 flows", 1)
			m.steeredOfFast("UDP_RR, 16 flows", 0.95)
			m.routedOfBridge("UDP_RR, 16 flows", 1)
		}
		return err
	})

var netConnect = netScenario("net-tcp-crr", "TCP: a connection for each request",
	"Connect, a byte there, one back, close (TCP_CRR). A connection's first and last packets take the ordinary path always, so this is what caches cost "+
		"where they gain least.",
	func(n *nets) error {
		m, _, err := n.measureTraffic(traffic.Run{Kind: traffic.TCPCRR}, report.PerSecond)
		if err == nil {
			m.ofBridge("TCP_CRR", 0.97)
			m.routedOfBridge("TCP_CRR", 1)
		}
		return err
	})

var netStream = netScenario("net-tcp-stream", "TCP: as many bytes as fit, one way",
	"Writes of 64 KiB over one connection (TCP_STREAM). A veth pair passes packets of up to 64 KiB whole, which flatters every overlay: see net-tcp-segments.",
	func(n *nets) error { return n.stream("TCP_STREAM") })

var netSegments = netScenario("net-tcp-segments", "TCP: the same without segmentation offload",
	"Segmentation offload and its counterpart on receive are off at hosts and pods, so that every packet is one of the wire's size: 1500 bytes on the hosts, "+
		"1450 in pods.",
	func(n *nets) error {
		for _, p := range n.pairs {
			if err := p.WithoutOffload(); err != nil {
				return err
			}
		}
		return n.stream("TCP_STREAM without segmentation offload")
	}, Tool{"ethtool", "ethtool"})

func (n *nets) stream(what string) error {
	m, _, err := n.measureTraffic(traffic.Run{Kind: traffic.TCPStream}, report.BytesPerSec)
	if err == nil {
		m.ofHost(what, 0.95)
		m.steeredOfFast(what, 0.95)
		m.routedOfBridge(what, 1)
	}
	return err
}

// rate is small datagrams one way.
func (n *nets) rate(what string, greet bool) error {
	m, _, err := n.measureTraffic(traffic.Run{
		Kind: traffic.UDPRate, Size: 64, Greet: greet, Duration: Pick(n.Mode(), 500*time.Millisecond, 1500*time.Millisecond, 2*time.Second),
	}, report.PerSecond)
	if err == nil {
		m.ofBridge(what, 1.25)
		m.steeredOfFast(what, 0.95)
		m.routedOfBridge(what, 1)
	}
	return err
}

var netRate = netScenario("net-udp-rate", "UDP: small datagrams one way, after a greeting",
	"A datagram goes there and one comes back, as when iperf3 -u begins; then datagrams of 64 bytes go one way as fast as they can, from one thread, and those "+
		"that another one gets are counted.",
	func(n *nets) error { return n.rate("64-byte datagrams one way, after a greeting", true) })

var netSilent = netScenario("net-udp-silent", "UDP: small datagrams one way, never answered",
	"The same without the greeting: conntrack has never seen an answer.",
	func(n *nets) error { return n.rate("64-byte datagrams that nobody answers", false) })

var netWeb = netScenario("net-nginx", "nginx and wrk",
	"nginx, one process, serves a file of 1 KiB; wrk asks for it over 16 connections that stay open, from one thread.",
	(*nets).web, Tool{"nginx", "nginx-light"}, Tool{"wrk", "wrk"})

func (n *nets) web() error {
	dir, err := n.place(mainGround, "web")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	conf := filepath.Join(dir, "nginx.conf")
	text := fmt.Sprintf(`daemon off; master_process off; user root; worker_processes 1; error_log %[1]s/log; pid %[1]s/pid;
events { worker_connections 256; }
http {
	access_log off; keepalive_requests 1000000000; tcp_nodelay on;
	client_body_temp_path %[1]s/b; proxy_temp_path %[1]s/p; fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
	server { listen %[2]d; root %[1]s; }
}
`, dir, port)
	if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(conf, []byte(text), 0o644), os.WriteFile(filepath.Join(dir, "file"), bytes.Repeat([]byte("x"), 1024), 0o644)); err != nil {
		return err
	}
	m := n.Metric(report.Metric{Name: "requests", Unit: report.PerSecond})
	n.addHits()
	const seconds = 1 // wrk knows whole ones
	err = n.served(func(p *pair.Pair) (func() error, error) {
		return p.Serve(port, lookTool("nginx"), "-p", dir, "-c", conf)
	}, func(c *Contender, p *pair.Pair) error {
		out, err := p.Ask(lookTool("wrk"), "-t1", "-c16", fmt.Sprintf("-d%ds", seconds), fmt.Sprintf("http://%s:%d/file", p.At, port))
		if err != nil {
			return err
		}
		_, after, _ := strings.Cut(out, "Requests/sec:")
		v, err := strconv.ParseFloat(strings.TrimSpace(strings.SplitN(strings.TrimSpace(after), "\n", 2)[0]), 64)
		if err != nil || v == 0 || strings.Contains(out, "Non-2xx") {
			return fmt.Errorf("wrk says %q", out)
		}
		m.Add(c, "", Sample{Value: v})
		return nil
	})
	if err == nil {
		m.ofHost("nginx and wrk", 0.93)
		m.ofBridge("nginx and wrk", 1)
	}
	return err
}

// served starts a server at every pair, lets the contenders take turns, and stops the servers.
func (n *nets) served(serve func(p *pair.Pair) (func() error, error), ask func(c *Contender, p *pair.Pair) error) (err error) {
	for _, c := range n.Contenders() {
		stop, serr := serve(n.pairs[c])
		if serr != nil {
			return serr
		}
		defer func() { err = errors.Join(err, stop()) }()
	}
	return n.Rounds(func(c *Contender) error {
		return n.counted(c, func(p *pair.Pair) error { return ask(c, p) })
	})
}

var netCache = netScenario("net-memcached", "memcached",
	"memcached with one thread; four clients, each a thread with a connection, ask for the same value of 100 bytes, one question at a time.",
	(*nets).cache, Tool{"memcached", "memcached"})

func (n *nets) cache() error {
	m := n.Metric(report.Metric{Name: "questions", Unit: report.PerSecond})
	n.addHits()
	value := strings.Repeat("x", 100)
	set := traffic.Run{Kind: traffic.TCPRR, Request: []byte("set key 0 0 100\r\n" + value + "\r\n"), Answer: len("STORED\r\n"), Duration: 100 * time.Millisecond}
	get := traffic.Run{
		Kind: traffic.TCPRR, Request: []byte("get key\r\n"), Answer: len("VALUE key 0 100\r\n" + value + "\r\nEND\r\n"), Flows: 4,
		Duration: Pick(n.Mode(), 400*time.Millisecond, time.Second, 1500*time.Millisecond),
	}
	err := n.served(func(p *pair.Pair) (func() error, error) {
		stop, err := p.Serve(port, lookTool("memcached"), "-u", "root", "-l", p.At.String(), "-p", strconv.Itoa(port), "-U", "0", "-t", "1", "-m", "64")
		if err != nil {
			return nil, err
		}
		r, err := n.flow(p, set)
		if err == nil && r.Count == 0 {
			err = errors.New("nothing was stored")
		}
		if err != nil {
			return nil, errors.Join(err, stop())
		}
		return stop, nil
	}, func(c *Contender, p *pair.Pair) error {
		r, err := n.flow(p, get)
		if err == nil {
			m.Add(c, "", Sample{Value: r.Rate()})
		}
		return err
	})
	if err == nil {
		m.ofHost("memcached", 0.93)
		m.ofBridge("memcached", 1)
	}
	return err
}

var netCNI = netScenario("net-cni", "Pods come and go",
	"100 pods (20 in a quick run) on one host get a network one after the other, and then lose it: the whole run of the CNI plugin as a container runtime runs "+
		"it, from its start to its end, with the agent's part in it. The client's CPU time is the plugin's.",
	(*nets).cni)

func (n *nets) cni() error {
	add := n.Metric(report.Metric{Name: "ADD", Unit: report.Seconds, LessIsBetter: true})
	del := n.Metric(report.Metric{Name: "DEL", Unit: report.Seconds, LessIsBetter: true})
	pods := Pick(n.Mode(), 20, 100, 100)
	var some []*Contender
	for _, c := range n.Contenders() {
		if c.IsLamina() {
			some = append(some, c)
		}
	}
	n.most = Pick(n.Mode(), 1, 1, 3)
	err := n.Turns(some, []string{""}, func(c *Contender, _ int) error {
		var all []*pair.Pod
		defer func() {
			for _, p := range all {
				p.NS.Close()
			}
		}()
		for range pods {
			p, err := n.pairs[c].Pod(0)
			if err != nil {
				return err
			}
			all = append(all, p)
		}
		for _, step := range []struct {
			*Metric
			verb func(*pair.Pod) error
		}{{add, (*pair.Pod).Add}, {del, (*pair.Pod).Del}} {
			for _, p := range all {
				if n.ctx.Err() != nil {
					return n.ctx.Err()
				}
				began := time.Now()
				if err := step.verb(p); err != nil {
					return err
				}
				s := seconds(time.Since(began))
				s.ClientCPU = p.Used.Seconds()
				step.Add(c, "", s)
			}
		}
		return nil
	})
	if err == nil {
		for _, m := range []*Metric{add, del} {
			for _, name := range []string{fastPath, steered} {
				if v, ok := m.Median(name, ""); ok {
					m.Figure(report.AtMost(fmt.Sprintf("ms: CNI %s, %d in a row, %s", m.Name, pods, name), 1000*v, 50))
				}
			}
		}
	}
	return err
}
