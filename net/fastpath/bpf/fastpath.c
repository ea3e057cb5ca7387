// SPDX-License-Identifier: Apache-2.0
// The fast path's programs. See fastpath.h for the records, ../doc.go for the design.
#include "fastpath.h"

char LICENSE[] SEC("license") = "Apache-2.0";

#define ADJ_ROOM_DECAP_L4_UDP (1ULL << 10) // newer than many a linux/bpf.h
#define TCX_NEXT -1
#define BULK_NS 100000000ULL

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct control);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} control SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1); // Options.Flows
	__type(key, struct flow);
	__type(value, struct filter);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} filters SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1); // Options.Pods
	__type(key, struct addr);
	__type(value, __u32); // slot in locals
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} pods SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1); // Options.Pods
	__type(key, __u32);
	__type(value, struct pod);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} locals SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1); // Options.Nodes
	__type(key, struct prefix);
	__type(value, __u32); // slot in nodes
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} prefixes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1); // Options.Nodes
	__type(key, __u32);
	__type(value, struct node);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} nodes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, PROGRAMS * REASONS);
	__type(key, __u32);
	__type(value, __u64);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} counters SEC(".maps");

// What steering does with hits of the ingress program while they keep a CPU busy; else it is empty.
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} hits SEC(".maps");

struct vxlan {
	__be32 flags, vni;
} __attribute__((packed));

struct outer {
	struct ethhdr eth;
	struct iphdr ip;
	struct udphdr udp;
	struct vxlan vxlan;
	struct ethhdr inner;
} __attribute__((packed));

// What a program knows of the packet in its hands.
struct packet {
	struct flow flow;
	struct iphdr *ip; // the inner one
	__u32 length;     // of the IP packet
	__u32 headers;    // of those, IP and TCP or UDP headers
	bool syn, ack, ends;
};

static __always_inline __u64 count(enum program program, enum reason reason)
{
	__u32 i = program * REASONS + reason;
	__u64 *n = bpf_map_lookup_elem(&counters, &i);

	return n ? ++*n : 0;
}

static __always_inline int counted(enum program program, enum reason reason)
{
	count(program, reason);
	return TCX_NEXT;
}

static __always_inline struct addr v4(__be32 a)
{
	return (struct addr){ { 0, 0, bpf_htonl(0xffff), a } };
}

static __always_inline bool same_addr(const struct addr *a, const struct addr *b)
{
	return !((a->w[0] ^ b->w[0]) | (a->w[1] ^ b->w[1]) | (a->w[2] ^ b->w[2]) | (a->w[3] ^ b->w[3]));
}

static __always_inline bool same_mac(const __u8 *a, const __u8 *b)
{
	__u8 d = 0;

#pragma unroll
	for (int i = 0; i < ETH_ALEN; i++)
		d |= a[i] ^ b[i];
	return !d;
}

// Odd numbers without a pattern: digits of pi.
static const __u64 factors[] = {
	0x243f6a8885a308d3, 0x13198a2e03707345, 0xa4093822299f31d1, 0x082efa98ec4e6c89, 0x452821e638d01377,
	0xbe5466cf34e90c6d, 0xc0ac29b7c97c50dd, 0x3f84d5b5b5470917, 0x9216d5d98979fb1b, 0xd1310ba698dfb5ad,
};

static __always_inline __u64 mix(const __u64 *words, int n, __u64 sum)
{
#pragma unroll
	for (int i = 0; i < n; i++)
		sum += words[i] * factors[i];
	return sum ^ sum >> 32;
}

static __always_inline __u64 verdict_tag(const struct verdict *v, __u64 key)
{
	__u64 words[2];

	__builtin_memcpy(words, v, sizeof(words));
	return mix(words, 2, key);
}

static __always_inline __u64 pod_tag(const struct pod *p, __u64 secret)
{
	return mix((const __u64 *)p, 5, secret);
}

static __always_inline __u64 header_tag(const struct header *h, __u64 secret)
{
	return mix((const __u64 *)h, 10, secret);
}

static __always_inline bool voided(__u32 generation, __u32 since)
{
	return !generation || (__s32)(generation - since) < 0;
}

static __always_inline __u32 younger(__u32 a, __u32 b)
{
	return (__s32)(a - b) > 0 ? a : b;
}

static __always_inline struct control *the_control(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&control, &zero);
}

// gate says whether anything but the ordinary path may be used at all.
static __always_inline enum reason gate(struct __sk_buff *skb, const struct control *c, __u64 now)
{
	if (!c->enabled)
		return DISABLED;
	if ((__s64)(now - c->heartbeat) > (__s64)c->heartbeat_timeout)
		return STALE;
	if (skb->mark)
		return FOREIGN_MARK;
	return HIT;
}

// parse reads the headers of the IPv4 packet at ip, of which room bytes are in the buffer. local says which end is ours.
static __always_inline enum reason parse(struct packet *p, void *ip, void *end, __u32 room, bool local_is_source)
{
	struct iphdr *h = ip;
	struct udphdr *udp = (void *)(h + 1);
	struct tcphdr *tcp = (void *)(h + 1);
	__be16 from, to;

	if ((void *)(h + 1) > end || h->version != 4)
		return MALFORMED;
	if (h->ihl > 5)
		return OPTIONS;
	p->length = bpf_ntohs(h->tot_len);
	if (h->ihl < 5 || p->length != room)
		return MALFORMED;
	if (h->frag_off & bpf_htons(0x3fff))
		return FRAGMENT;
	switch (h->protocol) {
	case IPPROTO_UDP:
		if ((void *)(udp + 1) > end || bpf_ntohs(udp->len) != p->length - sizeof(*h))
			return MALFORMED;
		from = udp->source;
		to = udp->dest;
		p->headers = sizeof(*h) + sizeof(*udp);
		p->syn = p->ack = p->ends = false;
		break;
	case IPPROTO_TCP:
		if ((void *)(tcp + 1) > end)
			return MALFORMED;
		from = tcp->source;
		to = tcp->dest;
		p->headers = sizeof(*h) + tcp->doff * 4;
		if (tcp->doff < 5 || p->headers > p->length)
			return MALFORMED;
		p->syn = tcp->syn;
		p->ack = tcp->ack;
		p->ends = tcp->fin || tcp->rst;
		break;
	default:
		return PROTOCOL;
	}
	p->ip = h;
	p->flow = (struct flow){
		.local = v4(local_is_source ? h->saddr : h->daddr),
		.remote = v4(local_is_source ? h->daddr : h->saddr),
		.local_port = local_is_source ? from : to,
		.remote_port = local_is_source ? to : from,
		.protocol = h->protocol,
	};
	return HIT;
}

// pod_at copies the record in a slot if it is that of the address.
static __always_inline bool pod_at(struct pod *copy, __u32 slot, const struct addr *a, __u64 secret)
{
	struct pod *p = bpf_map_lookup_elem(&locals, &slot);

	if (!p)
		return false;
	*copy = *p;
	return same_addr(&copy->addr, a) && pod_tag(copy, secret) == copy->tag;
}

// find_pod copies the record of a local pod. A flow that is known knows the slot.
static __always_inline bool find_pod(struct pod *copy, const struct filter *f, const struct addr *a, __u64 secret)
{
	__u32 *slot;

	if (f && pod_at(copy, f->in.port, a, secret))
		return true;
	slot = bpf_map_lookup_elem(&pods, a);
	return slot && pod_at(copy, *slot, a, secret);
}

static __always_inline struct node *find_node(const struct addr *a, __u32 *slot)
{
	struct prefix key = { .length = 128, .addr = *a };
	__u32 *s = bpf_map_lookup_elem(&prefixes, &key);

	if (!s)
		return 0;
	*slot = *s;
	return bpf_map_lookup_elem(&nodes, slot);
}

static __always_inline __u64 flow_key(const struct flow *f, __u64 secret)
{
	return mix((const __u64 *)f, sizeof(*f) / 8, secret);
}

// known checks a copy of a verdict on its own: whole, and not voided by a change.
static __always_inline enum reason known(const struct verdict *v, __u64 key, __u32 since)
{
	if (!v->generation)
		return ONE_SIDED;
	if (verdict_tag(v, key) != v->tag)
		return TORN;
	if (voided(v->generation, since))
		return OUTDATED;
	return HIT;
}

// two_way says whether a flow has packets in both directions. A flow of UDP need not: its directions are served each by
// itself, and their leases show conntrack that it is alive.
static __always_inline bool two_way(const struct flow *f)
{
	return f->protocol != IPPROTO_UDP;
}

static __always_inline bool lease_over(const struct verdict *v, const struct control *c, __u8 protocol, __u64 now)
{
	__u64 lease = protocol == IPPROTO_TCP ? c->tcp_lease : c->udp_lease;

	return (__s64)(now - v->at) >= (__s64)lease;
}

// missed sends a packet the ordinary way, marked so that the learn programs look at it.
static __always_inline int missed(struct __sk_buff *skb, const struct control *c, enum program program, enum reason why)
{
	__u32 generation = c->generation;

	if (generation & 1)
		return counted(program, CHANGING);
	skb->mark = MARK_MISS | (generation >> 1 & MARK_GENERATION);
	return counted(program, why);
}

// missed_in is missed at ingress. Where the flow's next packets may well be hits, this one must not wait for another CPU.
static __always_inline int missed_in(struct __sk_buff *skb, const struct control *c, enum reason why)
{
	if (why != OUTER_CHECKSUM)
		skb->tc_index = KEEP_OFF;
	return missed(skb, c, INGRESS, why);
}

// Adding 1 to the checksum's high byte is taking 1 from the time to live.
static __always_inline void decrease_ttl(struct iphdr *ip)
{
	__u32 check = ip->check + bpf_htons(0x0100);

	ip->check = check + (check >= 0xffff);
	ip->ttl--;
}

static __always_inline __u16 fold(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	return sum + (sum >> 16);
}

static __always_inline void set_ecn(struct iphdr *ip, __u8 ecn)
{
	__u16 *word = (__u16 *)ip, old = *word;

	ip->tos = (ip->tos & ~3) | ecn;
	ip->check = ~fold((__u16)~ip->check + (__u16)~old + *word);
}

// pull makes n bytes of the packet readable if it has them.
static __always_inline void pull(struct __sk_buff *skb, __u32 n)
{
	if (skb->len < n)
		n = skb->len;
	if ((void *)(long)skb->data + n > (void *)(long)skb->data_end)
		bpf_skb_pull_data(skb, n);
}

// A packet from a pod, at the ingress of the host's end of its veth pair.
SEC("tcx/ingress")
int egress(struct __sk_buff *skb)
{
	struct control *c = the_control();
	__u64 now = bpf_ktime_get_coarse_ns();
	struct packet p = {};
	struct pod pod;
	struct filter *f;
	struct node *node;
	union {
		struct header record;
		struct outer outer;
	} h;
	__u64 key;
	__u32 slot, since;
	enum reason why;

	if (!c)
		return TCX_NEXT;
	if (skb->protocol != bpf_htons(ETH_P_IP) || skb->vlan_present || skb->pkt_type)
		return counted(EGRESS, NOT_IPV4);
	why = gate(skb, c, now);
	if (why)
		return counted(EGRESS, why);
	pull(skb, ETH_HLEN + sizeof(struct iphdr) + sizeof(struct tcphdr));
	why = parse(&p, (void *)(long)skb->data + ETH_HLEN, (void *)(long)skb->data_end, skb->len - ETH_HLEN, true);
	if (why)
		return counted(EGRESS, why);
	f = bpf_map_lookup_elem(&filters, &p.flow);
	if (!find_pod(&pod, f, &p.flow.local, c->secret) || pod.ifindex != skb->ifindex)
		return counted(EGRESS, NOT_LOCAL);
	if (p.syn || p.ends) {
		if (f)
			bpf_map_delete_elem(&filters, &p.flow);
		// The answer to a connection's first packet is established for conntrack, and the next packet still
		// misses: a flow learned from here has shown conntrack its whole handshake.
		if (p.ends || !p.ack || !find_node(&p.flow.remote, &slot))
			return counted(EGRESS, TCP_FLAGS);
		return missed(skb, c, EGRESS, TCP_FLAGS);
	}
	if ((skb->gso_size ? p.headers + skb->gso_size : p.length) > c->mtu || p.length + OUTER > 0xffff)
		return counted(EGRESS, TOO_BIG);
	if (p.ip->ttl <= 1)
		return counted(EGRESS, TTL);

	if (!f) {
		// Only here the longest prefix is asked for: a verdict knows its node.
		if (!find_node(&p.flow.remote, &slot))
			return counted(EGRESS, NOT_REMOTE);
		return missed(skb, c, EGRESS, NOT_LEARNED);
	}
	struct verdict out = f->out, in = f->in;
	since = younger(pod.since, c->since);
	key = flow_key(&p.flow, c->secret);
	why = known(&out, key, since);
	if (!why && two_way(&p.flow))
		why = known(&in, key, since); // the reverse check
	if (!why && lease_over(&out, c, p.flow.protocol, now))
		why = LEASE_OVER;
	if (why)
		return missed(skb, c, EGRESS, why);
	slot = out.node;
	node = bpf_map_lookup_elem(&nodes, &slot);
	if (!node)
		return missed(skb, c, EGRESS, NO_HEADER);
	h.record = node->header;
	if (voided(h.record.generation, c->since))
		return missed(skb, c, EGRESS, NO_HEADER);
	if (header_tag(&h.record, c->secret) != h.record.tag)
		return missed(skb, c, EGRESS, TORN);

	__u32 ifindex = h.record.ifindex, sum = h.record.sum, length = p.length;
	__u8 ecn = p.ip->tos & 3;
	if (bpf_skb_adjust_room(skb, OUTER, BPF_ADJ_ROOM_MAC,
				BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP |
					BPF_F_ADJ_ROOM_ENCAP_L2(ETH_HLEN) | BPF_F_ADJ_ROOM_ENCAP_L2_ETH))
		return counted(EGRESS, KERNEL);
	void *data = (void *)(long)skb->data;
	if (data + HEADER + sizeof(struct iphdr) > (void *)(long)skb->data_end)
		return TC_ACT_SHOT; // cannot be: the bytes were there
	decrease_ttl(data + HEADER);
	h.outer.ip.tos |= ecn; // RFC 6040, 4.1: normal mode copies
	h.outer.ip.tot_len = bpf_htons(length + OUTER);
	// Routers may fragment, for DF is clear as on the ordinary path: identifications differ, between CPUs by an offset.
	h.outer.ip.id = count(EGRESS, HIT) + bpf_get_smp_processor_id() * 0x9e35;
	h.outer.ip.check = ~fold(sum + h.outer.ip.tot_len + h.outer.ip.id + bpf_htons(ecn));
	h.outer.udp.source = out.port;
	h.outer.udp.len = bpf_htons(length + OUTER - sizeof(struct iphdr));
#pragma unroll
	for (int i = 0; i < HEADER / 8; i++)
		((__u64 *)data)[i] = h.record.bytes[i];
	return bpf_redirect(ifindex, 0);
}

// is_ours checks an outer header: this overlay's, and addressed to this host.
static __always_inline enum reason is_ours(const struct outer *o, const struct control *c, __u32 length)
{
	struct addr to = v4(o->ip.daddr);

	if (o->ip.version != 4 || o->ip.ihl != 5 || o->ip.protocol != IPPROTO_UDP || !same_addr(&to, &c->node))
		return NOT_IPV4;
	if (o->ip.frag_off & bpf_htons(0x3fff))
		return FRAGMENT;
	if (o->udp.dest != c->port)
		return NOT_IPV4;
	if (bpf_ntohs(o->ip.tot_len) != length - ETH_HLEN ||
	    bpf_ntohs(o->udp.len) != length - ETH_HLEN - sizeof(struct iphdr))
		return MALFORMED;
	if (o->vxlan.flags != bpf_htonl(VXLAN_FLAGS) || o->vxlan.vni != bpf_htonl(c->vni << 8))
		return VNI;
	if (o->inner.h_proto != bpf_htons(ETH_P_IP) || !same_mac(o->inner.h_dest, c->mac))
		return NOT_IPV4;
	return HIT;
}

// A packet of the underlay, at the NIC's ingress.
SEC("tcx/ingress")
int ingress(struct __sk_buff *skb)
{
	struct control *c = the_control();
	__u64 now, key;
	struct packet p = {};
	struct outer *o;
	struct pod pod;
	struct filter *f;
	struct node *node;
	__u32 slot, since;
	enum reason why;

	if (!c || skb->protocol != bpf_htons(ETH_P_IP) || skb->vlan_present || skb->pkt_type)
		return TCX_NEXT;
	if (skb->len < HEADER + sizeof(struct iphdr) + sizeof(struct udphdr))
		return TCX_NEXT;
	pull(skb, HEADER + sizeof(struct iphdr) + sizeof(struct tcphdr));
	o = (void *)(long)skb->data;
	if ((void *)(o + 1) > (void *)(long)skb->data_end)
		return TCX_NEXT;
	why = is_ours(o, c, skb->len);
	if (why == NOT_IPV4) // the host's own traffic is not counted
		return TCX_NEXT;
	if (why)
		return counted(INGRESS, why);
	now = bpf_ktime_get_coarse_ns();
	why = gate(skb, c, now);
	if (why)
		return counted(INGRESS, why);
	why = parse(&p, o + 1, (void *)(long)skb->data_end, skb->len - HEADER, false);
	if (why)
		return counted(INGRESS, why);
	f = bpf_map_lookup_elem(&filters, &p.flow);
	if (!find_pod(&pod, f, &p.flow.local, c->secret))
		return counted(INGRESS, NOT_LOCAL);

	struct addr from = v4(o->ip.saddr);
	bool first = p.syn || p.ends;
	if (first && f)
		bpf_map_delete_elem(&filters, &p.flow);
	if (first || !f) {
		node = find_node(&p.flow.remote, &slot);
		if (!node || !same_addr(&node->addr, &from))
			return counted(INGRESS, node ? WRONG_NODE : NOT_REMOTE);
		if (p.ends || (p.syn && !p.ack))
			return counted(INGRESS, TCP_FLAGS);
		return missed_in(skb, c, first ? TCP_FLAGS : NOT_LEARNED);
	}
	struct verdict out = f->out, in = f->in;
	since = younger(pod.since, c->since);
	key = flow_key(&p.flow, c->secret);
	why = known(&in, key, since);
	if (!why && two_way(&p.flow))
		why = known(&out, key, since); // the reverse check
	if (why == HIT) {
		slot = in.node;
		node = bpf_map_lookup_elem(&nodes, &slot);
		if (!node || !same_addr(&node->addr, &from))
			return counted(INGRESS, WRONG_NODE);
		if (two_way(&p.flow) && voided(node->header.generation, c->since))
			why = NO_HEADER;
		else if (lease_over(&in, c, p.flow.protocol, now))
			why = LEASE_OVER;
		else if (o->udp.check)
			why = OUTER_CHECKSUM;
	} else {
		node = find_node(&p.flow.remote, &slot);
		if (!node || !same_addr(&node->addr, &from))
			return counted(INGRESS, node ? WRONG_NODE : NOT_REMOTE);
	}
	if (why)
		return missed_in(skb, c, why);
	// A flow that uses segmentation offload keeps to the ordinary path for a moment, so that its small packets do not
	// overtake its big ones.
	if (!c->clean) {
		if (skb->gso_size)
			f->bulk = now;
		if (skb->gso_size || now - f->bulk < BULK_NS)
			return counted(INGRESS, SEGMENTS);
	}
	if (p.ip->ttl <= 1)
		return counted(INGRESS, TTL);

	// RFC 6040, 4.2.
	__u8 outer_ecn = o->ip.tos & 3, ecn = p.ip->tos & 3;
	if (outer_ecn == 3 && ecn == 0)
		return counted(INGRESS, ECN);
	if (bpf_skb_adjust_room(skb, -OUTER, BPF_ADJ_ROOM_MAC,
				BPF_F_ADJ_ROOM_FIXED_GSO | (c->clean ? ADJ_ROOM_DECAP_L4_UDP : 0)))
		return counted(INGRESS, KERNEL);
	struct ethhdr *eth = (void *)(long)skb->data;
	struct iphdr *ip = (void *)(eth + 1);
	if ((void *)(ip + 1) > (void *)(long)skb->data_end)
		return TC_ACT_SHOT; // cannot be: the bytes were there
	if (ecn != 0 && (outer_ecn == 3 || (outer_ecn == 1 && ecn == 2)))
		set_ecn(ip, outer_ecn);
	decrease_ttl(ip);
	__builtin_memcpy(eth->h_dest, pod.mac, ETH_ALEN);
	__builtin_memcpy(eth->h_source, pod.gateway, ETH_ALEN);
	counted(INGRESS, HIT);
	skb->cb[0] = pod.ifindex;
	bpf_tail_call(skb, &hits, 0);
	return bpf_redirect_peer(pod.ifindex, 0);
}

// marked says whether a learn program may believe a packet.
static __always_inline bool marked(struct __sk_buff *skb, const struct control *c, enum program program, __u32 *generation)
{
	__u32 mark = skb->mark;

	if ((mark & ~MARK_GENERATION) == MARK_MISS)
		counted(program, UNESTABLISHED);
	if ((mark & ~MARK_GENERATION) != (MARK_MISS | MARK_ESTABLISHED))
		return false;
	*generation = c->generation;
	if (*generation & 1) {
		counted(program, CHANGING);
		return false;
	}
	if ((*generation >> 1 & MARK_GENERATION) != (mark & MARK_GENERATION)) {
		counted(program, SUPERSEDED);
		return false;
	}
	return true;
}

// learn records a verdict. Writers race for a record and may spoil it: its tag says so, and it is learned again.
static __always_inline enum reason learn(const struct flow *flow, struct verdict *v, bool outward, __u64 secret)
{
	struct filter *f = bpf_map_lookup_elem(&filters, flow), fresh = {};
	struct verdict *to;
	enum reason what = LEARNED;

	v->tag = verdict_tag(v, flow_key(flow, secret));
	if (f) {
		to = outward ? &f->out : &f->in;
		if (to->generation == v->generation && to->node == v->node && to->port == v->port)
			what = CONFIRMED;
		*to = *v;
		return what;
	}
	if (outward)
		fresh.out = *v;
	else
		fresh.in = *v;
	bpf_map_update_elem(&filters, flow, &fresh, BPF_NOEXIST);
	return LEARNED;
}

// learn_header records the way to a node, unless it is known.
static __always_inline void learn_header(struct __sk_buff *skb, struct node *node, const struct outer *seen,
					 const struct control *c, __u32 generation)
{
	union {
		struct header record;
		struct outer outer;
	} h;
	__u32 sum = 0;
	__u64 other = 0;
	bool current = !voided(node->header.generation, c->since);

#pragma unroll
	for (int i = 0; i < HEADER / 8; i++)
		h.record.bytes[i] = ((const __u64 *)seen)[i];
	h.outer.ip.tos &= ~3;
	h.outer.ip.tot_len = h.outer.ip.id = h.outer.ip.check = 0;
	h.outer.udp.source = h.outer.udp.len = h.outer.udp.check = 0;
#pragma unroll
	for (int i = 0; i < (int)sizeof(struct iphdr) / 2; i++)
		sum += ((__u16 *)h.record.bytes)[ETH_HLEN / 2 + i];
	h.record.ifindex = skb->ifindex;
	h.record.sum = sum;
	h.record.pad = 0;
#pragma unroll
	for (int i = 0; i < HEADER / 8; i++)
		other |= h.record.bytes[i] ^ node->header.bytes[i];
	if (current && !other && node->header.ifindex == h.record.ifindex &&
	    header_tag(&node->header, c->secret) == node->header.tag)
		return;
	h.record.generation = generation;
	h.record.tag = header_tag(&h.record, c->secret);
	node->header = h.record;
}

// A packet of the ordinary path, encapsulated, at the NIC's egress.
SEC("tcx/egress")
int egress_learn(struct __sk_buff *skb)
{
	struct control *c;
	struct packet p = {};
	struct outer *o;
	struct node *node;
	__u32 slot, generation;
	enum reason why;

	if (!skb->mark)
		return TCX_NEXT;
	c = the_control();
	if (!c || !c->enabled || !marked(skb, c, EGRESS_LEARN, &generation))
		return TCX_NEXT;
	if (skb->protocol != bpf_htons(ETH_P_IP) || skb->vlan_present)
		return counted(EGRESS_LEARN, UNCACHEABLE);
	pull(skb, HEADER + sizeof(struct iphdr) + sizeof(struct tcphdr));
	o = (void *)(long)skb->data;
	if ((void *)(o + 1) > (void *)(long)skb->data_end)
		return counted(EGRESS_LEARN, MALFORMED);
	struct addr from = v4(o->ip.saddr), to = v4(o->ip.daddr);
	if (o->eth.h_proto != bpf_htons(ETH_P_IP) || o->ip.version != 4 || o->ip.ihl != 5 || o->ip.frag_off ||
	    o->ip.protocol != IPPROTO_UDP || o->udp.dest != c->port || o->vxlan.flags != bpf_htonl(VXLAN_FLAGS) ||
	    o->vxlan.vni != bpf_htonl(c->vni << 8) || o->inner.h_proto != bpf_htons(ETH_P_IP) ||
	    !same_addr(&from, &c->node))
		return counted(EGRESS_LEARN, UNCACHEABLE);
	why = parse(&p, o + 1, (void *)(long)skb->data_end, skb->len - HEADER, true);
	if (why)
		return counted(EGRESS_LEARN, why);
	node = find_node(&p.flow.remote, &slot);
	if (!node)
		return counted(EGRESS_LEARN, NOT_REMOTE);
	if (!same_addr(&node->addr, &to))
		return counted(EGRESS_LEARN, WRONG_NODE);
	learn_header(skb, node, o, c, generation);
	struct verdict v = { .generation = generation, .node = slot, .port = o->udp.source, .at = bpf_ktime_get_coarse_ns() };
	return counted(EGRESS_LEARN, learn(&p.flow, &v, true, c->secret));
}

// A packet of the ordinary path, at the egress of the host's end of a pod's veth pair.
SEC("tcx/egress")
int ingress_learn(struct __sk_buff *skb)
{
	struct control *c;
	struct packet p = {};
	struct pod pod;
	__u32 slot, generation, *local;
	enum reason why;

	if (!skb->mark)
		return TCX_NEXT;
	c = the_control();
	if (!c || !c->enabled || !marked(skb, c, INGRESS_LEARN, &generation))
		return TCX_NEXT;
	if (skb->protocol != bpf_htons(ETH_P_IP) || skb->vlan_present)
		return counted(INGRESS_LEARN, NOT_IPV4);
	pull(skb, ETH_HLEN + sizeof(struct iphdr) + sizeof(struct tcphdr));
	why = parse(&p, (void *)(long)skb->data + ETH_HLEN, (void *)(long)skb->data_end, skb->len - ETH_HLEN, false);
	if (why)
		return counted(INGRESS_LEARN, why);
	local = bpf_map_lookup_elem(&pods, &p.flow.local);
	if (!local || !pod_at(&pod, *local, &p.flow.local, c->secret) || pod.ifindex != skb->ifindex)
		return counted(INGRESS_LEARN, NOT_LOCAL);
	if (!find_node(&p.flow.remote, &slot))
		return counted(INGRESS_LEARN, NOT_REMOTE);
	struct verdict v = { .generation = generation, .node = slot, .port = *local, .at = bpf_ktime_get_coarse_ns() };
	return counted(INGRESS_LEARN, learn(&p.flow, &v, false, c->secret));
}
