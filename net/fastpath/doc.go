// Package fastpath lets packets of established connections between pods of different nodes bypass the ordinary path. It is
// ONCache (Lin et al., NSDI 2025) on a routed overlay: four tc programs remember what the ordinary path decided.
//
// # Programs
//
//	egress         host's end of a pod's veth, ingress   writes outer headers, redirects to the NIC
//	ingress        NIC, ingress                          takes outer headers off, redirects into the pod
//	egress_learn   NIC, egress                           learns the header to a node and that a flow may leave
//	ingress_learn  host's end of a pod's veth, egress    learns that a flow may arrive
//
// A packet that cannot be served is marked ([MarkMiss] and the low bits of the generation) and goes the ordinary way. Rules
// of nftables, after the policies (package overlay), or [MarkEstablished] into the marks of established flows, and of UDP
// that nobody has answered yet from its second packet on, so that single questions do not fill the caches. The learn programs believe packets that have both. The published prototype uses bits of the DSCP for this; a mark is zero in
// the pod and on the wire, so nothing leaks and nobody can forge it.
//
// # Records
//
//	control   array        what the agent tells the programs
//	filters   LRU hash     flow -> a verdict for each direction: node, outer source port, generation, time
//	pods      hash         address of a local pod -> slot
//	locals    array        slot -> pod's address, interface, MACs, generation since which verdicts are valid
//	prefixes  LPM trie     prefix of a node's pods -> slot
//	nodes     array        slot -> node's address and learned 64-byte header
//	counters  per-CPU      program and reason -> packets
//
// Only flows are in an LRU: how many there are is up to the pods. What the agent puts in, pods and nodes, is of a known
// number and is never evicted. Verdicts name the slots of node and pod, so that a hit takes one hash look-up.
//
// # Never wrong
//
// A packet is served only if its own direction has a valid verdict whose lease is running and, for TCP, the other direction
// has a valid one too (reverse check): conntrack has seen both. UDP may have one direction only. What keeps that from
// hiding a flow for ever is the lease: conntrack sees a packet of each direction every few seconds, long before it would
// forget even a flow that nobody answers (nf_conntrack_udp_timeout, 30 s), and so knows an answer when it comes. A lease is renewed by the ordinary path: every few seconds one packet of a direction goes there, which keeps
// conntrack alive, finds out that conntrack has forgotten the flow, and brings new headers when a MAC of the underlay has
// changed. Fragments, IP options, SYN, FIN, RST, what is larger than the MTU, what would expire on the way, other protocols,
// other VNIs and other ports take the ordinary path, and so does everything while the agent's heartbeat is missing.
// Addresses are 128 bits wide everywhere, IPv4 is mapped.
//
// The time to live is decreased by each host, as the routed path does. ECN is copied outward and combined inward by
// RFC 6040's normal mode (Linux' VXLAN device sends CE as ECT(0), which decapsulates to the same). The outer UDP checksum
// is zero; packets that carry one are verified by the ordinary path.
//
// # Changes
//
// [Path.Change] applies a change of the node's state without a race: it makes the generation odd, so that nothing is marked;
// voids verdicts of the pods concerned by raising the generation they are valid since; applies the change; forgets conntrack
// entries; makes the generation even. Packets that were marked before carry an older generation and teach nothing, however
// long they have been on their way (up to 256 changes; the mark has eight bits of it). Records that a program may read while
// they are replaced carry a tag over key and content, see bpf/fastpath.h.
//
// # Kernel settings
//
// conntrack sees few packets of a flow, so it must not judge by sequence numbers: Open sets nf_conntrack_tcp_be_liberal in
// the host's network namespace, and raises nf_conntrack_tcp_timeout_unacknowledged to nf_conntrack_tcp_timeout_established.
// What counts or limits packets on the ordinary path sees one packet a lease.
package fastpath
