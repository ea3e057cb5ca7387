package cli

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"lamina/net/agent"
	"lamina/net/kube"
	"lamina/net/overlay"
	"lamina/net/peers"
	"lamina/net/peers/etcd"
	"lamina/net/policy"

	"github.com/spf13/pflag"
)

// netSource is the flags that say where an agent's peers come from.
type netSource struct {
	peers                     string
	etcd, etcdPrefix          string
	etcdCA, etcdCert, etcdKey string
	etcdUser, etcdPassword    string
	network                   string
	bits                      int
	kubernetes                bool
	kubeconfig, nodeName      string
	cluster                   *kube.Cluster // with kubernetes
}

func (s *netSource) flags(fs *pflag.FlagSet) {
	fs.StringVar(&s.peers, "peers", "", "the file that names the nodes")
	fs.StringVar(&s.etcd, "etcd", "", "URLs of the etcd that has the nodes' leases, with commas between them")
	fs.StringVar(&s.etcdPrefix, "etcd-prefix", etcd.DefaultPrefix, "what the keys in etcd begin with, the same on all nodes")
	fs.StringVar(&s.etcdCA, "etcd-ca", "", "a file with the certificates, in PEM, by which to know etcd; empty: the system's")
	fs.StringVar(&s.etcdCert, "etcd-cert", "", "a file with the certificate, in PEM, by which etcd is to know this node")
	fs.StringVar(&s.etcdKey, "etcd-key", "", "a file with the key, in PEM, of that certificate")
	fs.StringVar(&s.etcdUser, "etcd-user", "", "the name by which etcd is to know this node")
	fs.StringVar(&s.etcdPassword, "etcd-password-file", "", "a file with the password of that name")
	fs.StringVar(&s.network, "pod-network", "10.244.0.0/16", "with --etcd, the prefix that the nodes' prefixes are taken from, the same on all nodes")
	fs.IntVar(&s.bits, "pod-bits", 24, "with --etcd, how many bits a node's prefix has, the same on all nodes")
	fs.BoolVar(&s.kubernetes, "kubernetes", false, "have nodes, pods and policies from Kubernetes")
	fs.StringVar(&s.kubeconfig, "kubeconfig", "", "with --kubernetes, the file that says where the API server is; empty: as a pod of the cluster")
	fs.StringVar(&s.nodeName, "node-name", "", "with --kubernetes, the name of this node's Node; empty: the environment's NODE_NAME")
}

// open completes an agent's configuration by its source. The caller calls done when the agent has ended.
func (s *netSource) open(c *agent.Config) (done func(), err error) {
	var given []string
	for flag, set := range map[string]bool{"--peers": s.peers != "", "--etcd": s.etcd != "", "--kubernetes": s.kubernetes} {
		if set {
			given = append(given, flag)
		}
	}
	slices.Sort(given)
	switch {
	case len(given) == 0:
		return nil, errors.New("--peers is missing: name the file that names the nodes, the etcd that has their leases with --etcd, or --kubernetes")
	case len(given) > 1:
		return nil, fmt.Errorf("%s: nodes come from one of them: leave the others out, here or in the configuration file", strings.Join(given, " and "))
	case s.etcd != "":
		return s.openEtcd(c)
	case s.kubernetes && c.Overlay.Self.Prefix.IsValid():
		return nil, errors.New("--pod-cidr: with --kubernetes the prefix is the Node's podCIDR: leave it out")
	case s.kubernetes:
		c.Source, c.SourceName = s.cluster, s.cluster.Name()
		return func() {}, nil
	}
	if s.peers, err = filepath.Abs(s.peers); err != nil {
		return nil, err
	}
	c.Source, c.SourceName = peers.File(s.peers), "file "+s.peers
	return func() {}, nil
}

// feed is what policies come from besides files.
func (s *netSource) feed(stateDir string) (policy.Feed, error) {
	if !s.kubernetes {
		return nil, nil
	}
	c, err := kube.Config(s.kubeconfig)
	if err != nil {
		return nil, err
	}
	s.cluster, err = kube.New(kube.Options{Config: c, Node: cmp.Or(s.nodeName, os.Getenv("NODE_NAME")), Saved: filepath.Join(stateDir, "kubernetes.json")})
	return s.cluster, err
}

func (s *netSource) openEtcd(c *agent.Config) (done func(), err error) {
	o := etcd.Options{Endpoints: strings.Split(s.etcd, ","), Prefix: s.etcdPrefix, User: s.etcdUser}
	for _, e := range o.Endpoints {
		scheme, host, ok := strings.Cut(e, "://")
		if !ok || scheme != "http" && scheme != "https" || host == "" {
			return nil, fmt.Errorf("--etcd: %q is not a URL such as https://192.168.0.9:2379", e)
		}
	}
	if o.TLS, err = s.etcdTLS(); err != nil {
		return nil, err
	}
	if s.etcdPassword != "" {
		b, err := os.ReadFile(s.etcdPassword)
		if err != nil {
			return nil, fmt.Errorf("--etcd-password-file: %w", err)
		}
		o.Password = strings.TrimRight(string(b), "\r\n")
	}
	if (o.User == "") != (s.etcdPassword == "") {
		return nil, errors.New("--etcd-user and --etcd-password-file belong together: give both")
	}
	m := etcd.Member{Bits: s.bits}
	if m.Network, err = netip.ParsePrefix(s.network); err != nil {
		return nil, fmt.Errorf("--pod-network: %q is not a prefix such as 10.244.0.0/16", s.network)
	}
	if self := &c.Overlay.Self; !self.Node.IsValid() {
		if self.Node, err = overlay.DefaultAddress(c.Overlay.NS); err != nil {
			return nil, err
		}
	}
	if m.Source, err = etcd.New(o); err != nil {
		return nil, err
	}
	c.Source, c.SourceName = m, "etcd "+s.etcd
	return func() { m.Close() }, nil
}

// etcdTLS is nil when no file is named: https is then as the system has it.
func (s *netSource) etcdTLS() (*tls.Config, error) {
	if s.etcdCA+s.etcdCert+s.etcdKey == "" {
		return nil, nil
	}
	c := &tls.Config{}
	if s.etcdCA != "" {
		b, err := os.ReadFile(s.etcdCA)
		if err != nil {
			return nil, fmt.Errorf("--etcd-ca: %w", err)
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(b) {
			return nil, fmt.Errorf("--etcd-ca: %s holds no certificate in PEM", s.etcdCA)
		}
	}
	if (s.etcdCert == "") != (s.etcdKey == "") {
		return nil, errors.New("--etcd-cert and --etcd-key belong together: give both")
	}
	if s.etcdCert != "" {
		if _, err := tls.LoadX509KeyPair(s.etcdCert, s.etcdKey); err != nil {
			return nil, fmt.Errorf("--etcd-cert, --etcd-key: %w", err)
		}
		// Read for every connection: certificates are renewed.
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(s.etcdCert, s.etcdKey)
			return &pair, err
		}
	}
	return c, nil
}
