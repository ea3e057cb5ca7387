package policy

import (
	"fmt"
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	k8svalidation "k8s.io/apimachinery/pkg/util/validation"
)

// podsFile is the form of a pods file:
//
//	namespaces:
//	- name: shop
//	  labels: {tier: gold}
//	pods:
//	- namespace: shop
//	  name: web-0
//	  labels: {app: web}
//	  addresses: [10.42.1.5]
//	  ports: [{name: http, port: 8080}]
type podsFile struct {
	Namespaces []struct {
		Name   string            `json:"name"`
		Labels map[string]string `json:"labels"`
	} `json:"namespaces"`
	Pods []struct {
		Namespace   string            `json:"namespace"`
		Name        string            `json:"name"`
		Labels      map[string]string `json:"labels"`
		Addresses   []string          `json:"addresses"`
		HostNetwork bool              `json:"hostNetwork"`
		Ports       []struct {
			Name     string `json:"name"`
			Protocol string `json:"protocol"`
			Port     int    `json:"port"`
		} `json:"ports"`
	} `json:"pods"`
}

// ParsePods reads a pods file: the pods and namespaces of the whole network where there is no Kubernetes to ask. A
// pod without addresses adds labels and ports to the one that CNI made under its name. The error is a *FileError.
func ParsePods(file string, data []byte) (Inventory, error) {
	var in podsFile
	if err := unmarshalStrict(data, &in); err != nil {
		return Inventory{}, &FileError{file, "file", "", oneLine(err), "use the form in docs/network.md"}
	}
	var out Inventory
	for i, ns := range in.Namespaces {
		at := fmt.Sprintf("namespaces[%d]", i)
		if why := k8svalidation.IsDNS1123Label(ns.Name); len(why) > 0 {
			return Inventory{}, &FileError{file, at, "name", fmt.Sprintf("is %q", ns.Name), why[0]}
		}
		if err := validLabels(ns.Labels); err != nil {
			return Inventory{}, &FileError{file, at, "labels", err.Error(), "use labels as Kubernetes allows them"}
		}
		out.Namespaces = append(out.Namespaces, Namespace{Name: ns.Name, Labels: ns.Labels})
	}
	named := map[string]bool{}
	for i, p := range in.Pods {
		bad := func(field, problem, remedy string) (Inventory, error) {
			return Inventory{}, &FileError{file, fmt.Sprintf("pods[%d]", i), field, problem, remedy}
		}
		pod := Pod{Namespace: p.Namespace, Name: p.Name, Labels: p.Labels, HostNetwork: p.HostNetwork}
		if pod.Namespace == "" {
			pod.Namespace = "default"
		}
		if why := k8svalidation.IsDNS1123Label(pod.Namespace); len(why) > 0 {
			return bad("namespace", fmt.Sprintf("is %q", pod.Namespace), why[0])
		}
		if why := k8svalidation.IsDNS1123Subdomain(p.Name); len(why) > 0 {
			return bad("name", fmt.Sprintf("is %q", p.Name), why[0])
		}
		if named[pod.key()] {
			return bad("name", pod.key()+" is there twice", "rename or remove one of the two")
		}
		named[pod.key()] = true
		if err := validLabels(p.Labels); err != nil {
			return bad("labels", err.Error(), "use labels as Kubernetes allows them")
		}
		for j, a := range p.Addresses {
			addr, err := netip.ParseAddr(a)
			if err != nil || addr.Zone() != "" {
				return bad(fmt.Sprintf("addresses[%d]", j), fmt.Sprintf("is %q", a), "write an address as 10.42.1.5")
			}
			pod.Addrs = append(pod.Addrs, addr.Unmap())
		}
		for j, q := range p.Ports {
			at := fmt.Sprintf("ports[%d]", j)
			if why := k8svalidation.IsValidPortName(q.Name); len(why) > 0 {
				return bad(at+".name", fmt.Sprintf("is %q", q.Name), why[0])
			}
			if q.Port < 1 || q.Port > 65535 {
				return bad(at+".port", fmt.Sprintf("is %d", q.Port), "use a number from 1 to 65535")
			}
			proto := corev1.Protocol(q.Protocol)
			switch proto {
			case "", corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP:
			default:
				return bad(at+".protocol", fmt.Sprintf("is %q", q.Protocol), "use TCP, UDP or SCTP")
			}
			pod.Ports = append(pod.Ports, Port{Name: q.Name, Protocol: proto, Port: uint16(q.Port)})
		}
		out.Pods = append(out.Pods, pod)
	}
	return out, nil
}

func validLabels(labels map[string]string) error {
	for k, v := range labels {
		if why := k8svalidation.IsQualifiedName(k); len(why) > 0 {
			return fmt.Errorf("name %q: %s", k, why[0])
		}
		if why := k8svalidation.IsValidLabelValue(v); len(why) > 0 {
			return fmt.Errorf("value %q of %s: %s", v, k, why[0])
		}
	}
	return nil
}
