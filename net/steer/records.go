package steer

// Limits, as in bpf/steer.c.
const (
	maxCPUs  = 256
	flowlets = 8192
	nowhere  = 0xffff
	keepOff  = 0x6c61
)

// Stage is one that a program chooses the CPU of.
type Stage uint8

// Stages, as in bpf/steer.c.
const (
	VXLAN Stage = iota
	Pod
	Hits // the pod's, of packets that the fast path serves
	stages
)

var stageNames = [stages]string{"vxlan", "pod", "hits"}

func (s Stage) String() string { return stageNames[s] }

// Reason is why a packet goes on where it does.
type Reason uint8

// Reasons, as in bpf/steer.c.
const (
	Kept Reason = iota
	Steered
	NoBetter
	Idle
	Saturated
	Stale
	ToBeFast
	NoFlow
	reasons
)

// Each reason's name in counters and what it means for people.
var reasonTexts = [reasons]struct{ name, text string }{
	Kept:      {"kept", "where its flow's packets may still be"},
	Steered:   {"steered", "to the less busy of two CPUs"},
	NoBetter:  {"no_better", "here: neither of two CPUs is much less busy"},
	Idle:      {"idle", "here: packets do not keep this CPU busy, or come one by one"},
	Saturated: {"saturated", "here: no CPU has time to spare"},
	Stale:     {"stale", "here: the agent's heartbeat is missing"},
	ToBeFast:  {"to_be_fast", "here: the fast path is about to serve its flow"},
	NoFlow:    {"no_flow", "here: not IPv4 inside, or cut short"},
}

func (r Reason) String() string { return reasonTexts[r].name }

// Text is the reason for people.
func (r Reason) Text() string { return reasonTexts[r].text }
