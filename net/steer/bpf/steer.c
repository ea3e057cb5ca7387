// SPDX-License-Identifier: Apache-2.0
// Chooses the CPU of the next stage of a packet that takes the ordinary path. See ../doc.go for the design.
//
// A program sets the packet's hash; receive packet steering (RPS) of the next device takes cpus[hash * n >> 32], and leaves
// a packet whose hash is 0 where it is.
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/udp.h>
#include <stdbool.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

char LICENSE[] SEC("license") = "Apache-2.0";

#define TCX_NEXT -1
#define CPUS 256            // RPS may know that many
#define FLOWLETS 8192       // for each stage
#define NOWHERE 0xffff
#define TUNNEL 50           // Ethernet, IPv4, UDP and VXLAN headers
#define VXLAN_FLAGS 0x08000000
#define SPREAD ((1u << 23) - 1) // below 2^32 / CPUS, with room for rounding

// What the fast path puts into tc_index of a packet whose flow it is about to serve: also in ../../fastpath/bpf/fastpath.h.
#define KEEP_OFF 0x6c61

// What tells the pod's program, in tc_index, that a CPU has been chosen.
#define CHOSEN 0x6c62

// The stages that a program chooses the CPU of. HITS is that of the pod for packets that the fast path serves: it has the
// choices of POD, and counters of its own.
enum stage { VXLAN, POD, HITS, STAGES };

// Why a packet goes on where it does.
enum reason {
	KEPT,       // packets of its flow may be under way: it follows them
	STEERED,    // the better of two CPUs, and better than this one
	NO_BETTER,  // neither of two CPUs has much less to do than this one
	IDLE,       // packets do not keep this CPU busy: handing over costs more than it brings
	SATURATED,  // no CPU of the host has time to spare
	STALE,      // no heartbeat of the agent
	TO_BE_FAST, // the fast path is about to learn the flow, or is renewing it
	NO_FLOW,    // neither IPv4 inside, nor short
	REASONS,
};

struct load {
	__u32 busy, receiving; // in 1/1000: with anything, with packets (in interrupts)
	__u32 squeezed, pad; // bool: it keeps leaving packets for later
	__u64 drained;       // ns, monotonic: what was handed over before has been seen gone
};

// Written by the agent.
struct control {
	__u64 heartbeat, timeout; // ns, monotonic
	__u64 secret;
	__u32 cpus;      // n of RPS
	__u32 saturated; // bool
	__u32 worth;     // 1/1000: a CPU that is less busy with packets hands nothing over
	__u32 margin;    // 1/1000: how much less busy another has to be
	__u32 vni, device; // device: the VXLAN device's index
	__be16 port;
	__u16 pad[3];
	__u16 number[CPUS];   // place in RPS' table -> CPU
	__u16 place[CPUS];    // CPU -> place in RPS' table, or NOWHERE
	struct load load[CPUS]; // by place
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct control);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} control SEC(".maps");

// What was chosen for the flows whose hash leads here, and when the latest packet came: one word, so that it is replaced
// whole. Flows that share a word share the choice. ns / 1024 << 16 | RAN_HERE | CPU
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, HITS * FLOWLETS);
	__type(key, __u32);
	__type(value, __u64);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} flowlets SEC(".maps");

#define RAN_HERE 0x8000 // not handed over: whatever was before it on that CPU has run
#define CPU 0x3fff

// Packets that a CPU has let go on to the VXLAN device without handing them over, and that have not arrived there.
struct local {
	__s64 pending;
	__u64 since; // ns, monotonic: the first of them
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct local);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} locals SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, STAGES * REASONS);
	__type(key, __u32);
	__type(value, __u64);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} reasons SEC(".maps");

// By the CPU that chose (per CPU): packets for each CPU, and after these how many flows moved to it.
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, STAGES * CPUS * 2);
	__type(key, __u32);
	__type(value, __u64);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} chosen SEC(".maps");

static __always_inline void count(void *map, __u32 i)
{
	__u64 *n = bpf_map_lookup_elem(map, &i);

	if (n)
		++*n;
}

static __always_inline struct control *the_control(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&control, &zero);
}

static __always_inline __u64 mix(__u64 v)
{
	v ^= v >> 32;
	v *= 0x9216d5d98979fb1b;
	v ^= v >> 29;
	v *= 0xd1310ba698dfb5ad;
	return v ^ v >> 32;
}

// flow_of is a hash of the packet whose Ethernet header is at an offset, 0 if it is none that is steered. Both directions of
// a connection differ.
static __always_inline __u64 flow_of(struct __sk_buff *skb, __u32 offset, __u64 secret)
{
	struct {
		__u8 pad[2]; // aligns
		struct ethhdr eth;
		struct iphdr ip;
	} h;
	__u32 ports = 0;

	if (bpf_skb_load_bytes(skb, offset, &h.eth, sizeof(h.eth) + sizeof(h.ip)) || h.eth.h_proto != bpf_htons(ETH_P_IP) ||
	    h.ip.version != 4 || h.ip.ihl < 5)
		return 0;
	if (!(h.ip.frag_off & bpf_htons(0x3fff)) &&
	    (h.ip.protocol == IPPROTO_TCP || h.ip.protocol == IPPROTO_UDP || h.ip.protocol == IPPROTO_SCTP))
		bpf_skb_load_bytes(skb, offset + ETH_HLEN + h.ip.ihl * 4, &ports, sizeof(ports));
	return mix(mix(secret ^ ((__u64)h.ip.saddr << 32 | h.ip.daddr)) + ((__u64)ports << 8 | h.ip.protocol)) | 1;
}

// hash_for is a hash that RPS with n CPUs takes to a place; the flow's own bits are below, because GRO sorts by them.
static __always_inline __u32 hash_for(__u32 place, __u32 n, __u64 flow)
{
	return ((__u64)place << 32) / n + 1 + ((__u32)(flow >> 8) & SPREAD);
}

// better chooses a CPU for packets of a flow that nothing keeps where they were. old is the place they were, or NOWHERE.
static __always_inline __u32 better(const struct control *c, __u64 now, __u32 here, __u32 old, __u64 flow, bool bulk, enum reason *why)
{
	__u32 n = c->cpus, m, a, b, busy, best;

	*why = STALE;
	if ((__s64)(now - c->heartbeat) > (__s64)c->timeout)
		return here;
	*why = SATURATED;
	if (c->saturated)
		return here;
	*why = IDLE;
	busy = c->load[here & (CPUS - 1)].busy;
	// Requests and answers that come one by one can keep a CPU busy too, and are only slower with another one in between.
	// Flows that send much at once, and CPUs that do not get round to all of it, are not like that.
	if (old == NOWHERE || old == here) {
		if (c->load[here & (CPUS - 1)].receiving < c->worth || (c->worth && !bulk && !c->load[here & (CPUS - 1)].squeezed))
			return here;
	} else if (c->load[here & (CPUS - 1)].receiving < c->worth / 2) {
		return here;
	}
	*why = NO_BETTER;
	if (n < 2 || n > CPUS)
		return here;
	// Two of the others, by chance: which ones changes with time, so that a flow that finds no better one tries on, and
	// flows that look at the same moment look at different ones.
	flow = mix(flow + (now >> 26));
	m = n - 1;
	a = (flow & 0xffffffff) * m >> 32;
	b = a;
	if (m > 1) {
		b = a + 1 + ((flow >> 32) * (m - 1) >> 32);
		if (b >= m)
			b -= m;
	}
	a += a >= here;
	b += b >= here;
	best = c->load[b & (CPUS - 1)].busy < c->load[a & (CPUS - 1)].busy ? b : a;
	if (old != NOWHERE && old != here && c->load[old & (CPUS - 1)].busy <= c->load[best & (CPUS - 1)].busy + c->margin)
		best = old;
	if (c->load[best & (CPUS - 1)].busy + c->margin > busy)
		return here;
	*why = STEERED;
	return best;
}

// hash_here keeps a packet on its way into a pod on this CPU: it waits in this CPU's queue in any case. Where packets leave
// by another way routing and queues of interfaces go by the hash, so it is not 0, which would be the same for all flows.
static __always_inline __u32 hash_here(const struct control *c, __u64 flow)
{
	__u32 cpu = bpf_get_smp_processor_id(), n = c->cpus;

	if (!n || cpu >= CPUS || c->place[cpu & (CPUS - 1)] == NOWHERE)
		return 0;
	return hash_for(c->place[cpu & (CPUS - 1)], n, flow);
}

// choose is the hash that takes the packet to the CPU of its next stage. 0: it goes on here.
static __always_inline __u32 choose(const struct control *c, enum stage stage, __u64 flow, bool keep_off, bool bulk, struct local *local)
{
	__u32 cpu = bpf_get_smp_processor_id(), i = (stage == VXLAN ? 0 : FLOWLETS) + (flow >> 16) % FLOWLETS, here, at, to, n = c->cpus;
	__u64 *word = bpf_map_lookup_elem(&flowlets, &i), old, new, now = bpf_ktime_get_ns();
	bool ran_here, free, direct = stage != POD; // what is not handed over does not even wait in this CPU's queue
	enum reason why = KEPT;

	if (!word || !n || cpu >= CPUS || c->place[cpu & (CPUS - 1)] == NOWHERE)
		return 0;
	here = c->place[cpu & (CPUS - 1)];
	old = *(volatile __u64 *)word;
	to = old & CPU;
	at = old ? c->place[to & (CPUS - 1)] : NOWHERE;
	ran_here = old & RAN_HERE;
	// May packets of the flow be overtaken? Those that ran here have left for the VXLAN device if no packet of this CPU's
	// is on its way there, and have arrived in the pod if they are not of the same handful as this one. Those that wait in
	// a CPU's queue have left when the agent has seen the queue empty since.
	if (at == NOWHERE || now >> 10 > (old >> 16) + 1000000)
		free = true;
	else if (ran_here && to == cpu)
		free = stage == VXLAN ? local && !local->pending : now >> 10 > (old >> 16) + 2000;
	else
		free = c->load[at & (CPUS - 1)].drained >> 10 > old >> 16;
	if (stage == HITS && free && !(ran_here && to == cpu)) {
		// Hits that nobody has seen here may have been before it.
		to = cpu;
		ran_here = true;
		goto chosen;
	}
	if (free) {
		if (keep_off) {
			// The flow's next packets are about to bypass the stages, so this one runs through them at once.
			count(&reasons, stage * REASONS + TO_BE_FAST);
			return 0;
		}
		to = c->number[better(c, now, here, at, flow + (stage != VXLAN), bulk, &why) & (CPUS - 1)];
		ran_here = direct && to == cpu;
	} else {
		ran_here = direct && ran_here && to == cpu;
	}
chosen:
	new = now >> 10 << 16 | (ran_here ? RAN_HERE : 0) | to;
	// Writing each packet's time would have CPUs fight for the word. The agent's side allows for the difference.
	if ((new ^ old) & 0xffff || (new >> 16) - (old >> 16) > 1000) {
		__u64 seen = __sync_val_compare_and_swap(word, old, new);

		if (seen != old) { // another CPU was faster: its choice counts
			to = seen & CPU;
			ran_here = false;
			why = KEPT;
		} else if (old && to != (old & CPU)) {
			count(&chosen, STAGES * CPUS + stage * CPUS + (to & (CPUS - 1)));
		}
	}
	count(&reasons, stage * REASONS + why);
	count(&chosen, stage * CPUS + (to & (CPUS - 1)));
	at = c->place[to & (CPUS - 1)];
	if (at == NOWHERE)
		return 0;
	if (to == cpu && ran_here)
		return 0;
	return hash_for(at, n, flow);
}

static __always_inline struct local *the_local(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&locals, &zero);
}

static __always_inline __u32 segments(const struct __sk_buff *skb) { return skb->gso_segs ? skb->gso_segs : 1; }

// A packet of the underlay that the fast path did not take, at the NIC's ingress: chooses the CPU of the VXLAN stage.
static __always_inline int at_nic(struct __sk_buff *skb)
{
	struct control *c = the_control();
	struct {
		struct iphdr ip;
		struct udphdr udp;
		__be32 flags, vni;
	} h;
	struct local *local = the_local();
	__u64 flow, now;
	__u32 hash = 0;

	if (!c || !local || skb->protocol != bpf_htons(ETH_P_IP) || skb->vlan_present || skb->pkt_type)
		return TCX_NEXT;
	if (bpf_skb_load_bytes(skb, ETH_HLEN, &h, sizeof(h)) || h.ip.version != 4 || h.ip.ihl != 5 ||
	    h.ip.protocol != IPPROTO_UDP || h.ip.frag_off & bpf_htons(0x3fff) || h.udp.dest != c->port ||
	    h.flags != bpf_htonl(VXLAN_FLAGS) || h.vni != bpf_htonl(c->vni << 8))
		return TCX_NEXT;
	now = bpf_ktime_get_ns();
	if (local->pending && now - local->since > 1000000000) // what was dropped in between is not on its way for ever
		local->pending = 0;
	flow = flow_of(skb, TUNNEL, c->secret);
	if (flow)
		hash = choose(c, VXLAN, flow, skb->tc_index == KEEP_OFF, skb->gso_size, local);
	else
		count(&reasons, VXLAN * REASONS + NO_FLOW);
	if (!hash) {
		if (!local->pending)
			local->since = now;
		local->pending += segments(skb);
	}
	bpf_set_hash(skb, hash);
	return TCX_NEXT;
}

// A packet out of the tunnel, at the VXLAN device's ingress: chooses the CPU of the pod's stage.
static __always_inline int at_device(struct __sk_buff *skb)
{
	struct control *c = the_control();
	struct local *local = the_local();
	__u64 flow;
	__u32 hash = 0;

	if (!c || !local || !c->cpus)
		return TCX_NEXT;
	if (!skb->hash)
		local->pending -= segments(skb);
	flow = flow_of(skb, 0, c->secret);
	if (flow)
		hash = choose(c, POD, flow, skb->tc_index == KEEP_OFF, skb->gso_size, 0);
	else
		count(&reasons, POD * REASONS + NO_FLOW);
	bpf_set_hash(skb, hash ? hash : hash_here(c, flow));
	return TCX_NEXT;
}

// A packet to a pod, at the egress of the host's end of its veth pair. What does not come out of the tunnel, from pods and
// programs of this host or from outside, is not handed over.
static __always_inline int at_pod(struct __sk_buff *skb)
{
	struct control *c = the_control();

	if (skb->tc_index == CHOSEN)
		skb->tc_index = 0;
	else if (c && skb->ingress_ifindex != c->device)
		bpf_set_hash(skb, hash_here(c, (__u64)bpf_get_hash_recalc(skb) << 8));
	return TCX_NEXT;
}

// A packet that the fast path serves, at the NIC's ingress, without the tunnel: chooses the CPU of the pod's stage. The fast
// path calls it, with the host's end of the pod's veth pair in cb[0], while it is in its map of hits.
static __always_inline int at_hit(struct __sk_buff *skb)
{
	struct control *c = the_control();
	__u32 ifindex = skb->cb[0], hash = 0;
	__u64 flow;

	if (c) {
		flow = flow_of(skb, 0, c->secret);
		if (flow)
			hash = choose(c, HITS, flow, false, skb->gso_size, 0);
	}
	if (!hash)
		return bpf_redirect_peer(ifindex, 0);
	bpf_set_hash(skb, hash);
	skb->tc_index = CHOSEN;
	return bpf_redirect(ifindex, 0);
}

SEC("tcx/ingress")
int hit(struct __sk_buff *skb) { return at_hit(skb); }

SEC("tcx/ingress")
int nic(struct __sk_buff *skb) { return at_nic(skb); }

SEC("tcx/ingress")
int device(struct __sk_buff *skb) { return at_device(skb); }

SEC("tcx/egress")
int pod(struct __sk_buff *skb) { return at_pod(skb); }
