// SPDX-License-Identifier: Apache-2.0
// What the programs share with each other and with Go (bpf2go makes Go types of the structs below).
//
// Records that a program may read while they are replaced carry a tag, a checksum over the record and its key: the kernel
// reuses an element of a hash map at once, so a program that was interrupted between its look-up and its reads can find
// another key's record in its hands. Tags need no memory barriers, hold on every architecture, and turn every such
// case into a miss.
#ifndef FASTPATH_H
#define FASTPATH_H

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <stdbool.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define ABI 2 // raise it when a struct of this file changes its meaning

// The mark of a packet that one of the caches missed: MARK_MISS and the low bits of the generation it was missed in. The
// ordinary path ors MARK_ESTABLISHED in. All other bits have to be zero.
#define MARK_GENERATION 0x0ff
#define MARK_MISS 0x100
#define MARK_ESTABLISHED 0x200

// What tells steering's programs, in tc_index, to leave a packet on this CPU: also in ../../steer/bpf/steer.c.
#define KEEP_OFF 0x6c61

#define OUTER 50                 // IPv4, UDP, VXLAN and the inner Ethernet header
#define HEADER (OUTER + ETH_HLEN) // what the egress program writes
#define VXLAN_FLAGS 0x08000000   // a VNI and nothing else

enum program { EGRESS, INGRESS, EGRESS_LEARN, INGRESS_LEARN, PROGRAMS };

// Why a packet took the path it took.
enum reason {
	HIT,            // fast path
	DISABLED,       // switched off
	STALE,          // no heartbeat of the agent
	CHANGING,       // a change is being applied: nothing is marked, so nothing is learned
	FOREIGN_MARK,   // somebody else has marked the packet
	NOT_IPV4,       // IPv6, ARP, VLAN tags, frames to somebody else
	MALFORMED,      // short, or lengths that contradict each other
	OPTIONS,        // IP options
	FRAGMENT,       //
	PROTOCOL,       // neither TCP nor UDP
	TCP_FLAGS,      // SYN, FIN, RST: the state machine of conntrack has to see it
	TOO_BIG,        // more than the overlay's MTU
	TTL,            // would expire on the way
	NOT_LOCAL,      // source (destination on ingress) is no pod behind this interface
	NOT_REMOTE,     // the other end is no pod of another node
	WRONG_NODE,     // the other end's pod does not live at the node the packet comes from (goes to)
	NOT_LEARNED,    // flow unknown
	ONE_SIDED,      // only one direction of the flow is known
	OUTDATED,       // learned before the latest change
	LEASE_OVER,     // the ordinary path has to confirm the flow
	TORN,           // the record was being replaced
	NO_HEADER,      // no header to the node yet
	VNI,            // another overlay's packet
	OUTER_CHECKSUM, // outer UDP checksum: the ordinary path verifies it
	ECN,            // congestion experienced outside, not ECN-capable inside
	SEGMENTS,       // segmentation offload on receive: only the kernel can take its tunnel marks off
	KERNEL,         // a helper refused
	LEARNED,        // learn programs: recorded
	CONFIRMED,      // learn programs: known and still true
	UNESTABLISHED,  // learn programs: conntrack does not call the flow established
	SUPERSEDED,     // learn programs: marked before the latest change
	UNCACHEABLE,    // learn programs: an outer header that varies
	REASONS,
};

// An IPv6 address, or an IPv4 address mapped into one.
struct addr {
	__u32 w[4];
};

// A flow as this host sees it.
struct flow {
	struct addr local, remote;
	__be16 local_port, remote_port;
	__u8 protocol, pad[3];
};

// What the ordinary path has said of one direction of a flow, and when.
struct verdict {
	__u32 generation; // 0: nothing
	__u16 node;       // slot in nodes
	__u16 port;       // outward: outer UDP source port that the ordinary path chose, as on the wire; inward: slot in locals
	__u64 at;         // ns, monotonic
	__u64 tag;
};

struct filter {
	struct verdict out, in;
	__u64 bulk; // ns, monotonic: latest packet with segmentation offload on receive
};

struct pod {
	struct addr addr;
	__u32 ifindex; // of the host's end of the veth pair
	__u32 since;   // verdicts of earlier generations are void
	__u8 mac[6], gateway[6];
	__u32 pad;
	__u64 tag;
};

// Outer Ethernet, IPv4, UDP, VXLAN, inner Ethernet. What differs between packets is zero.
struct header {
	__u64 bytes[HEADER / 8];
	__u32 ifindex, generation;
	__u32 sum, pad; // of the outer IPv4 header, to make its checksum from
	__u64 tag;
};

struct node {
	struct addr addr;
	struct header header; // learned
};

struct prefix {
	__u32 length; // bits, 96 more for IPv4
	struct addr addr;
};

// The agent's side is written through a memory mapping, word by word.
struct control {
	__u32 abi;
	__u32 enabled;
	__u32 generation; // odd while a change is being applied
	__u32 since;      // records of earlier generations are void
	__u64 heartbeat, heartbeat_timeout; // ns, monotonic
	__u64 udp_lease, tcp_lease;         // ns
	__u64 secret;                       // of the tags
	struct addr node;                   // this host's address in the underlay
	__u32 vni, mtu;
	__be16 port;
	__u8 mac[6]; // of the VXLAN device
	__u32 clean; // the kernel takes tunnel marks off when asked (BPF_F_ADJ_ROOM_DECAP_L4_UDP)
	__u32 pad;
};

#endif
