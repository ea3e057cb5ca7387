// Draws each chart from the data beside it. Texts come with the data; only axes are labelled here.
"use strict";
(() => {
  const font = {fontSize: "12px", fontFamily: "inherit", background: "none", overflow: "visible"};

  // The step whose name leaves a value with few digits.
  const stepFor = (steps, v) => steps.reduce((best, s) => Math.abs(v) >= s.size * 0.9995 ? s : best, steps[0]);
  const digits = v => Number.isInteger(v) ? String(v).replace(/\B(?=(\d{3})+$)/g, "\u202f") : String(v);
  const label = (v, step) => `${digits(+(v / step.size).toPrecision(3))}\u00a0${step.name}`.trim();
  // Logarithmic axes name each tick with its own unit; linear ones all with the largest's. Given to axes as text, since
  // a tickFormat drops labels of logarithmic ones.
  const ticks = (steps, log, most) => log ? v => label(v, stepFor(steps, v)) : v => v === 0 ? "0" : label(v, stepFor(steps, most));

  const textWidth = (() => {
    const context = document.createElement("canvas").getContext("2d");
    return (s, weight = 400) => {
      context.font = `${weight} 12px ${getComputedStyle(document.body).fontFamily}`;
      return context.measureText(s).width;
    };
  })();

  // Round numbers that a linear axis in bytes or microseconds should stop at: multiples of its largest step.
  function linearTicks(steps, most, count) {
    const {size} = stepFor(steps, most);
    const raw = most / size / count, power = 10 ** Math.floor(Math.log10(raw));
    const by = [1, 2, 5, 10].map(f => f * power).find(f => f >= raw) * size;
    const out = [];
    for (let v = 0; v <= most * 1.0001; v += by) out.push(v);
    return out;
  }

  // Powers that a logarithmic axis names: of ten, or of 1024's roots where the unit is bytes.
  function logTicks(steps, least, most, count) {
    const base = steps.some(s => s.size === 1024) ? 2 : 10;
    const from = Math.floor(Math.log(least) / Math.log(base) + 1e-9), to = Math.ceil(Math.log(most) / Math.log(base) - 1e-9);
    const by = Math.max(1, Math.ceil((to - from) / count));
    const out = [];
    for (let e = from; e <= to && base ** e <= most * 1.0001; e++) if (base === 10 ? (e - from) % by === 0 : e % (by > 5 ? 10 : by) === 0) out.push(base ** e);
    return out;
  }

  function bars(data, width) {
    const names = data.contenders.map(c => c.name), colour = new Map(data.contenders.map(c => [c.name, c.colour]));
    const strong = new Set(data.contenders.filter(c => c.kind === "lamina").map(c => c.name));
    const narrow = width < 520, several = data.cases.length > 1;
    const marginLeft = narrow ? 4 : 14 + Math.max(...names.map(n => textWidth(n, strong.has(n) ? 700 : 400)));
    const marginRight = 18 + Math.max(...data.cells.map(c => textWidth(c.text, 700)));
    const values = data.cells.flatMap(c => [c.min, c.v, c.max]).filter(v => v > 0);
    const most = Math.max(...values), least = Math.min(...values);
    const start = data.log ? 10 ** Math.floor(Math.log10(least) - 0.15) : 0;
    const rowHeight = narrow ? 36 : 22, head = several ? (narrow ? 44 : 38) : narrow ? 14 : 6;
    const x1 = d => Math.max(d.v, start), at = v => Math.max(v, start);
    const room = width - marginLeft - marginRight;
    const marks = [
      Plot.gridX({ticks: data.log ? logTicks(data.steps, start, most, room / 70) : linearTicks(data.steps, most, room / 80), stroke: "var(--soft)", strokeOpacity: 0.25}),
      Plot.axisX({anchor: "bottom", label: null, tickSize: 0, color: "var(--soft)",
        ticks: data.log ? logTicks(data.steps, start, most, room / 70) : linearTicks(data.steps, most, room / 80),
        text: ticks(data.steps, data.log, most)}),
    ];
    const inset = {insetTop: narrow ? 17 : 3, insetBottom: 3}, dy = narrow ? 7 : 0;
    if (data.log) { // a bar's length says nothing on a logarithmic axis: a dot at the value, and a thread to its name
      marks.push(
        Plot.ruleY(data.cells, {fy: "case", y: "contender", x1: start, x2: x1, stroke: d => colour.get(d.contender), strokeOpacity: 0.45, dy}),
        Plot.dot(data.cells, {fy: "case", y: "contender", x: x1, r: 5.5, fill: d => colour.get(d.contender), dy}));
    } else {
      marks.push(Plot.barX(data.cells, {fy: "case", y: "contender", x1: 0, x2: "v", fill: d => colour.get(d.contender), ...inset}));
    }
    marks.push(
      Plot.ruleY(data.cells, {fy: "case", y: "contender", x1: d => at(d.min), x2: d => at(d.max), stroke: "var(--fg)", strokeWidth: 1, strokeOpacity: 0.75, dy}),
      Plot.ruleY(data.cells, {fy: "case", y: "contender", x1: d => at(d.q1), x2: d => at(d.q3), stroke: "var(--fg)", strokeWidth: 3, strokeOpacity: 0.55, dy}),
      ...[false, true].map(bold => Plot.text(data.cells.filter(d => strong.has(d.contender) === bold), {
        fy: "case", y: "contender", x: d => at(Math.max(d.v, d.max)), text: "text", textAnchor: "start", dx: 10, dy,
        fill: "var(--fg)", fontWeight: bold ? 700 : 400, fontVariant: "tabular-nums"})));
    const labels = data.cases.flatMap(k => names.map(n => ({case: k, contender: n, missing: !data.cells.some(c => c.case === k && c.contender === n)})));
    for (const bold of [false, true]) {
      marks.push(Plot.text(labels.filter(l => strong.has(l.contender) === bold), {
        fy: "case", y: "contender", frameAnchor: "left", text: "contender", fontWeight: bold ? 700 : 400,
        fill: l => l.missing ? "var(--soft)" : "var(--fg)",
        ...(narrow ? {textAnchor: "start", dy: -10} : {textAnchor: "end", dx: -10})}));
    }
    marks.push(
      Plot.text(labels.filter(l => l.missing), {fy: "case", y: "contender", frameAnchor: "left", text: () => "not measured", fill: "var(--soft)", fontStyle: "italic", textAnchor: "start", dx: 4, dy}),
      Plot.tip(data.cells, Plot.pointer({fy: "case", y: "contender", x: x1, title: "tip", maxRadius: 60, fill: "var(--bg)", stroke: "var(--soft)"})));
    if (several) {
      marks.push(Plot.text(data.cases, {fy: d => d, text: d => d, frameAnchor: "top-left", dx: -marginLeft + 4, dy: narrow ? -30 : -22, fontWeight: 700, fontSize: 13, fill: "var(--fg)", lineWidth: Infinity}));
    }
    return Plot.plot({
      width, marginLeft, marginRight, marginTop: head, marginBottom: 26, style: font,
      height: 26 + head + data.cases.length * (names.length * rowHeight + (several ? head : 0)),
      x: data.log ? {type: "log", domain: [start, most]} : {domain: [0, most]},
      y: {type: "band", domain: names, axis: null, padding: 0.05}, fy: {domain: data.cases, axis: null, padding: several ? head / (names.length * rowHeight + head) : 0},
      marks,
    });
  }

  function lines(data, width) {
    const order = c => (c.kind === "lamina" ? 1 : 0); // Lamina is drawn last, on top
    const contenders = [...data.contenders].sort((a, b) => order(a) - order(b));
    const first = data.contenders.find(c => c.kind === "lamina");
    const values = data.cells.flatMap(c => [c.q1, c.v, c.q3]).filter(v => !data.log || v > 0);
    const most = Math.max(...values), least = Math.min(...values), xs = data.cells.map(c => c.x);
    const cells = data.log ? data.cells.filter(c => c.v > 0) : data.cells;
    const room = width - 90, few = new Set(xs).size <= 12;
    const yTicks = data.log ? logTicks(data.steps, least, most, 7) : linearTicks(data.steps, most, 5);
    const marks = [
      Plot.ruleY(yTicks, {stroke: "var(--soft)", strokeOpacity: 0.25}),
      Plot.axisX({label: data.xName || null, labelAnchor: "center", labelArrow: "none", tickSize: 3, color: "var(--soft)",
        ticks: data.xLog ? (few ? [...new Set(xs)].sort((a, b) => a - b) : logTicks(data.xSteps, Math.min(...xs), Math.max(...xs), room / 60)) : room / 80,
        text: ticks(data.xSteps, data.xLog, Math.max(...xs))}),
      Plot.axisY({label: null, ticks: yTicks, tickSize: 0, color: "var(--soft)", text: ticks(data.steps, data.log, most)}),
    ];
    for (const c of contenders) {
      const own = cells.filter(d => d.contender === c.name), strokeWidth = c === first ? 3 : 1.8;
      marks.push(
        Plot.ruleX(own, {x: "x", y1: d => data.log ? Math.max(d.q1, least) : d.q1, y2: "q3", stroke: c.colour, strokeWidth: 3, strokeOpacity: 0.35}),
        Plot.line(own, {x: "x", y: "v", stroke: c.colour, strokeWidth, strokeDasharray: c.dash || null, sort: "x"}));
      if (few) marks.push(Plot.dot(own, {x: "x", y: "v", fill: c.colour, r: c === first ? 4 : 3}));
    }
    marks.push(Plot.tip(cells, Plot.pointer({x: "x", y: "v", title: "tip", maxRadius: 40, fill: "var(--bg)", stroke: "var(--soft)"})));
    return Plot.plot({
      width, height: Math.max(240, Math.min(360, width * 0.5)), marginLeft: 62, marginRight: 24, marginTop: 12, marginBottom: data.xName ? 40 : 26, style: font,
      x: {type: data.xLog ? "log" : "linear"}, y: data.log ? {type: "log", domain: [least, most]} : {domain: [0, most]},
      marks,
    });
  }

  function legend(data) {
    const ul = document.createElement("ul");
    ul.className = "legend";
    for (const c of data.contenders) {
      const li = document.createElement("li");
      const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg"), line = document.createElementNS(svg.namespaceURI, "line");
      svg.setAttribute("width", 26); svg.setAttribute("height", 8);
      for (const [k, v] of Object.entries({x1: 0, x2: 26, y1: 4, y2: 4, "stroke-width": 3, stroke: c.colour, "stroke-dasharray": c.dash})) line.setAttribute(k, v);
      svg.append(line);
      li.append(svg, c.name);
      ul.append(li);
    }
    return ul;
  }

  const drawn = new Map(); // by element: its data and the width it was drawn for
  function draw(div) {
    const {data} = drawn.get(div), width = Math.floor(div.clientWidth);
    if (!width || drawn.get(div).width === width) return;
    drawn.get(div).width = width;
    const svg = data.chart === "lines" ? lines(data, width) : bars(data, width);
    svg.setAttribute("aria-hidden", "true"); // the element around it says it in words
    div.replaceChildren(...(data.chart === "lines" ? [legend(data), svg] : [svg]));
  }

  const observer = new ResizeObserver(entries => entries.forEach(e => draw(e.target)));
  for (const script of document.querySelectorAll("script.chart-data")) {
    const div = script.previousElementSibling;
    drawn.set(div, {data: JSON.parse(script.textContent), width: 0});
    draw(div);
    observer.observe(div);
  }

  // On paper nothing can be unfolded.
  addEventListener("beforeprint", () => document.querySelectorAll("details:not([open])").forEach(d => { d.open = true; d.dataset.folded = ""; }));
  addEventListener("afterprint", () => document.querySelectorAll("details[data-folded]").forEach(d => { d.open = false; delete d.dataset.folded; }));
})();
