// Package policy enforces Kubernetes NetworkPolicy for the pods of one node, with nftables.
//
// # Terms
//
// A pod is an address (or several) with a namespace, a name, labels and named ports; it is local when its address lies
// in one of the node's pod prefixes. Only local pods are enforced; all pods count as peers. A flow is what a
// connection's first packet says as the forward chain sees it: after destination NAT and before source NAT.
//
// # From a policy to the kernel
//
//	files, CNI, Kubernetes ─► State ─Compile─► Ruleset ─Plan (what differs from the kernel's)─► one nft transaction
//	                                              │                                                    │
//	                                              └─ Allows(flow): the same rules, asked in Go ─► conntrack entries to forget
//
// Compile is a pure function: the same State gives the same Ruleset, byte for byte. Everything in the kernel lies in
// `table inet lamina` under names that begin with "policy-", but for the chain [Chain], to which the forward chain
// of package overlay jumps: it returns what is allowed and drops the rest.
//
// # What the rules say
//
// They are those of k8s.io/api/networking/v1. Where that text leaves room:
//
//   - A pod and the host it runs on always reach each other: such packets pass the hooks output and input, and
//     nothing is enforced there. A pod always reaches itself, also through a service's address.
//   - Policies see addresses after destination NAT and before masquerading.
//   - Protocols other than TCP, UDP and SCTP match a rule without ports, and no other. ICMP errors about an allowed
//     flow are part of it.
//   - A named port is looked up at the pod that receives, for ingress and egress alike.
//   - Pods that use the host's network are the host: no selector finds them.
//
// # Changes under traffic
//
// Established connections are not asked again, which makes them cheap, so what a change forbids is cut: see [Enforcer.Apply].
package policy
