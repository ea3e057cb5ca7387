// Package steer spreads the ordinary path's work on received packets over CPUs, stage by stage. It is Falcon (Lei et al.,
// EuroSys 2021) on an unchanged kernel.
//
// A packet from another node passes three stages: the NIC's, the VXLAN device's (decapsulation, routing, nftables) and the
// pod's (its stack and socket). Left alone one CPU runs all three. Here a program at the end of a stage sets the packet's
// hash, and the kernel's receive packet steering (RPS) of the next device follows it:
//
//	nic     NIC, ingress, behind the fast path's            chooses the CPU of the VXLAN stage
//	device  VXLAN device, ingress                           chooses the CPU of the pod's stage
//	pod     host's end of a pod's veth pair, egress         keeps what comes from this host or the world where it is
//
// RPS with n CPUs takes a packet to cpus[hash * n >> 32], and leaves one whose hash is 0 alone. The hash for place i is
// (i << 32) / n + 1 and 23 bits of the flow's own hash, which GRO sorts by. A packet into a pod waits in its CPU's queue even
// if nobody hands it over, so there the hash is that of the CPU it is on and never 0: what leaves by another way is spread
// over routes and queues by it.
//
// # Choice
//
// A flow goes on where it is (hash 0) unless packets keep the CPU busier than options.worth, and either the flow sends much
// at once (segmentation offload) or the CPU keeps leaving packets for later (time_squeeze of /proc/net/softnet_stat).
// Handing over costs an interrupt between CPUs and cold caches, and buys nothing while there is time to spare; requests and
// answers that come one by one can keep a CPU busy and would only be slower with another one in between. Nor is anything
// handed over while the whole host is busier than options.threshold.
//
// Otherwise two others are looked at, which the flow's hash and the time choose, and the less busy one is taken if it is by
// options.margin less busy than this one. How busy CPUs are is an average of /proc/stat that the agent writes every
// [period].
//
// # Order
//
// What is chosen holds for a flow until none of its packets can be under way, so that a move overtakes nothing:
//
//   - Packets that were handed to a CPU have left its queue when the agent, at least [guard] after the latest of them, has
//     seen that queue empty (/proc/net/softnet_stat).
//   - Packets that were not handed over have passed the VXLAN device when as many have arrived there as have been let go by
//     the NIC's program on this CPU. So a flow without a pause can leave a CPU that has become too busy.
//   - After a second without packets.
//
// The table of choices is an array that the flow's hash leads into; flows that share a word share the choice, and nothing is
// evicted. A word is replaced by compare-and-swap: of two CPUs that move a flow at the same time one wins and the other
// follows.
//
// # With the fast path
//
// What the fast path serves passes the pod's stage only, on the CPU it came to. While packets keep a CPU busy the fast path
// calls one more program for it, which it finds in its map of hits:
//
//	hit     goes on into the pod (bpf_redirect_peer), or to the CPU it chooses by way of the veth pair and RPS of its end
//
// A flow that was served at once is handed over after a moment without packets, in which the latest have got into the pod; one
// that comes back is served at once when its queue has been seen empty. The program stays as long as it hands anything over
// and [calm] more.
//
// Misses pass all stages; those of flows that it is about to serve, or serves and sends
// the ordinary way once to renew a lease, are left on their CPU, because the flow's next packets would overtake them.
//
// # When nobody looks after it
//
// Without the agent's heartbeat every choice is to go on here: what a host without steering does.
package steer
