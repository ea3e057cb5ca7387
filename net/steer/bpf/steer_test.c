// SPDX-License-Identifier: Apache-2.0
// The programs for BPF_PROG_TEST_RUN, which knows neither hash nor tc_index: both are taken from cb[0] and cb[1], and the
// hash goes to cb[2].
#include "steer.c"

#define TEST(name)                                \
	SEC("tcx/ingress")                        \
	int test_##name(struct __sk_buff *skb)    \
	{                                         \
		bpf_set_hash(skb, skb->cb[0]);    \
		skb->tc_index = skb->cb[1];       \
		at_##name(skb);                   \
		skb->cb[2] = skb->hash;           \
		return 0;                         \
	}

TEST(nic)
TEST(device)
TEST(pod)

// The hit program wants an interface in cb[0]: the loopback's.
SEC("tcx/ingress")
int test_hit(struct __sk_buff *skb)
{
	bpf_set_hash(skb, 0);
	skb->cb[0] = 1;
	at_hit(skb);
	skb->cb[2] = skb->hash;
	return 0;
}
