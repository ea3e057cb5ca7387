// Package exporter is what Lamina's exporters have in common: how metrics are declared, documented and served to Prometheus.
package exporter

import (
	"strings"

	"github.com/prometheus/client_golang/prometheus"
)

// Metric is one of those that are shown.
type Metric struct {
	Name   string
	Type   prometheus.ValueType
	Labels []string
	Help   string
}

// Types of metrics.
const (
	Counter = prometheus.CounterValue
	Gauge   = prometheus.GaugeValue
)

// NewGauge declares what goes up and down.
func NewGauge(name, help string, labels ...string) Metric { return Metric{name, Gauge, labels, help} }

// NewCounter declares what goes up until its program ends; its name ends in _total.
func NewCounter(name, help string, labels ...string) Metric {
	return Metric{name, Counter, labels, help}
}

// TypeName is the type as Prometheus calls it.
func (m *Metric) TypeName() string {
	if m.Type == Counter {
		return "counter"
	}
	return "gauge"
}

// Table is the documentation's table of metrics, in Markdown.
func Table(all []Metric) string {
	var b strings.Builder
	b.WriteString("| metric | type | labels | meaning |\n|---|---|---|---|\n")
	for _, m := range all {
		b.WriteString("| `" + m.Name + "` | " + m.TypeName() + " | " + strings.Join(m.Labels, ", ") + " | " + m.Help + " |\n")
	}
	return b.String()
}

// Descs are the descriptions of metrics by name.
type Descs map[string]*prometheus.Desc

// NewDescs makes them.
func NewDescs(all []Metric) Descs {
	d := Descs{}
	for _, m := range all {
		d[m.Name] = prometheus.NewDesc(m.Name, m.Help, m.Labels, nil)
	}
	return d
}

// Describe is a prometheus.Collector's.
func (d Descs) Describe(ch chan<- *prometheus.Desc) {
	for _, desc := range d {
		ch <- desc
	}
}

// Putter shows a value with its labels.
type Putter func(m Metric, v float64, labels ...string)

// Putter sends to a collection.
func (d Descs) Putter(ch chan<- prometheus.Metric) Putter {
	return func(m Metric, v float64, labels ...string) {
		for i := range labels {
			labels[i] = strings.ToValidUTF8(labels[i], "\uFFFD") // a mount point is any bytes
		}
		ch <- prometheus.MustNewConstMetric(d[m.Name], m.Type, v, labels...)
	}
}

// Number is 1 for true.
func Number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
