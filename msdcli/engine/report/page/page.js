"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const data = JSON.parse(document.getElementById("data").textContent);
  const said = document.getElementById("said");

  // Small things.

  function node(name, attributes = {}, parent = null, text = null) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== null) made.textContent = text;
    if (parent) parent.append(made);
    return made;
  }

  function element(name, className = "", text = null, parent = null) {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== null) made.textContent = text;
    if (parent) parent.append(made);
    return made;
  }

  function button(text, pressed, parent, act) {
    const made = element("button", "", text, parent);
    made.type = "button";
    made.setAttribute("aria-pressed", String(pressed));
    made.addEventListener("click", () => {
      const now = made.getAttribute("aria-pressed") !== "true";
      made.setAttribute("aria-pressed", String(now));
      act(now);
    });
    return made;
  }

  // What belongs to a student or a run has its colour; the rest is ink.
  function coloured(attributes, hue) {
    const own = hue !== null && hue !== undefined;
    return { ...attributes, class: `s ${own ? "own " : ""}${attributes.class || ""}`, ...(own ? { style: `--hue: ${hue}` } : {}) };
  }

  function swatch(hue, parent) {
    const made = element("span", "swatch", null, parent);
    if (hue === null || hue === undefined) made.style.background = "var(--soft)";
    else made.style.setProperty("--hue", hue);
    made.setAttribute("aria-hidden", "true");
    return made;
  }

  function short(value) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e6 || size < 1e-3) return value.toExponential(1).replace("e+", "e");
    if (size >= 1e4) return `${Number((value / 1e3).toPrecision(3))}k`;
    return String(Number(value.toPrecision(size >= 1000 ? 4 : 3)));
  }

  const exact = (value) => (Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(4))));

  function ticks(low, high, count) {
    const step = 10 ** Math.floor(Math.log10((high - low) / count));
    const wide = [1, 2, 5, 10].map((m) => m * step).find((s) => (high - low) / s <= count + 0.5);
    const found = [];
    for (let i = Math.ceil(low / wide - 1e-9); i * wide <= high + wide * 1e-9; i++) found.push(Number((i * wide).toPrecision(12)));
    return found;
  }

  function decades(low, high, count) {
    for (const multiples of [[1, 2, 3, 5], [1, 2, 5], [1, 3], [1]]) {
      const found = [];
      for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
        for (const m of multiples) if (m * 10 ** e >= low && m * 10 ** e <= high) found.push(Number((m * 10 ** e).toPrecision(6)));
      if (found.length <= count + 1 || multiples.length === 1) {
        const skip = Math.ceil(found.length / (count + 1));
        return found.length >= 2 ? found.filter((_, i) => i % skip === 0) : [low, high];
      }
    }
    return [];
  }

  function scale(low, high, from, to, log) {
    const f = log ? Math.log : (v) => v;
    const a = f(low), b = f(high);
    return (value) => from + ((f(value) - a) / (b - a || 1)) * (to - from);
  }

  function tip(plot) {
    const box = element("div", "tip", null, plot);
    box.hidden = true;
    return {
      hide() { box.hidden = true; },
      show(x, y, title, rows) {
        box.replaceChildren(element("b", "", title));
        for (const [hue, name, value] of rows) {
          const line = element("div", "", null, box);
          const left = element("span", "", null, line);
          if (hue !== undefined) swatch(hue, left);
          left.append(name);
          element("span", "", value, line);
        }
        box.hidden = false;
        const width = box.offsetWidth, room = plot.clientWidth;
        box.style.left = `${Math.max(0, Math.min(x + 14, room - width))}px`;
        if (x + 14 + width > room && x - width - 14 > 0) box.style.left = `${x - width - 14}px`;
        box.style.top = `${y}px`;
        return [title, ...rows.map(([, name, value]) => `${name} ${value}`)].join(", ");
      },
    };
  }

  // A drawing that the arrow keys walk through as the pointer does; what is shown is said to screen readers.
  function walkable(svg, label, state, count, show, hide) {
    svg.setAttribute("tabindex", "0");
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", `${label}. Arrow keys read the values.`);
    svg.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") { state.at = null; hide(); return; }
      if (event.key === "Home" || event.key === "End") state.at = event.key === "Home" ? 0 : count() - 1;
      else if (move) state.at = state.at === null ? (move > 0 ? 0 : count() - 1) : Math.max(0, Math.min(count() - 1, state.at + move));
      else return;
      event.preventDefault();
      said.textContent = show(state.at);
    });
    svg.addEventListener("blur", () => { state.at = null; hide(); });
    svg.addEventListener("pointerleave", () => hide());
  }

  // Curves.

  function curves(figure, chart) {
    const controls = figure.querySelector(".controls"), plot = figure.querySelector(".plot");
    const groups = [...new Map(chart.series.map((s) => [s.group, s.hue])).entries()];
    const off = new Set(), state = { at: null };
    let log = chart.log;
    const values = () => visible().flatMap((s) => s.points.map((p) => p[1]));
    const visible = () => chart.series.filter((s) => !off.has(s.group) && s.points.length);
    plot.replaceChildren();
    const shown = tip(plot);
    if (groups.length > 1)
      for (const [name, hue] of groups) {
        const made = button(name, true, controls, (on) => { on ? off.delete(name) : off.add(name); draw(); });
        made.prepend(swatch(hue));
        made.setAttribute("aria-label", `show ${name}`);
      }
    if (chart.series.some((s) => s.points.length) && Math.min(...values()) > 0) {
      const made = button("log", log, controls, (on) => { log = on; draw(); });
      made.classList.add("push");
      made.setAttribute("aria-label", "logarithmic scale");
    }

    function draw() {
      shown.hide();
      plot.querySelector("svg")?.remove();
      const width = plot.clientWidth, height = 210, left = 44, right = 8, top = 8, bottom = 34;
      const svg = node("svg", { width, height, viewBox: `0 0 ${width} ${height}` });
      plot.prepend(svg);
      const lines = visible();
      if (!lines.length) { node("text", { x: 8, y: 24 }, svg, "nothing is shown"); return; }
      const xs = [...new Set(lines.flatMap((s) => s.points.map((p) => p[0])))].sort((a, b) => a - b);
      let [low, high] = [Math.min(...values()), Math.max(...values())];
      if (low === high) [low, high] = [low - Math.abs(low || 1) / 10, high + Math.abs(high || 1) / 10];
      const useLog = log && low > 0;
      const pad = (high - low) * 0.05;
      if (!useLog) [low, high] = [low >= 0 && low < high * 0.3 ? 0 : low - pad, high + pad];
      const one = xs.length > 1 ? 0 : 1;  // a single step stands in the middle
      const X = scale(xs[0] - one, xs[xs.length - 1] + one, left, width - right, false);
      const Y = scale(low, high, height - bottom, top, useLog);
      for (const t of useLog ? decades(low, high, 5) : ticks(low, high, 4)) {
        node("line", { class: "gridline", x1: left, x2: width - right, y1: Y(t), y2: Y(t) }, svg);
        node("text", { x: left - 6, y: Y(t) + 4, "text-anchor": "end" }, svg, short(t));
      }
      for (const t of one ? xs : ticks(xs[0], xs[xs.length - 1], Math.max(2, Math.floor(width / 90)))) node("text", { x: X(t), y: height - bottom + 15, "text-anchor": "middle" }, svg, short(t));
      node("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }, svg);
      node("text", { x: width - right, y: height - 3, "text-anchor": "end" }, svg, chart.x);
      for (const s of lines) {
        const d = s.points.map(([x, y], i) => `${i ? "L" : "M"}${X(x).toFixed(1)} ${Y(y).toFixed(1)}`).join("");
        node("path", coloured({ class: lines.length > 8 ? "curve many" : "curve", d }, s.hue), svg);
        if (s.points.length < 12) for (const [x, y] of s.points) node("circle", coloured({ class: "dot", cx: X(x), cy: Y(y), r: 3 }, s.hue), svg);
      }
      const cursor = node("g", {}, svg);

      function show(i) {
        cursor.replaceChildren();
        const x = xs[i];
        node("line", { class: "cursor", x1: X(x), x2: X(x), y1: top, y2: height - bottom }, cursor);
        const near = lines.map((s) => [s, s.points.find((p) => p[0] === x)]).filter(([, p]) => p).sort((a, b) => b[1][1] - a[1][1]);
        for (const [s, p] of near) node("circle", coloured({ class: "dot", cx: X(x), cy: Y(p[1]), r: 4 }, s.hue), cursor);
        const rows = near.slice(0, 10).map(([s, p]) => [s.hue, s.label, exact(p[1])]);
        if (near.length > 10) rows.push([undefined, `and ${near.length - 10} more`, ""]);
        return shown.show(X(x), top, `${chart.x.split(",")[0]} ${exact(x)}`, rows);
      }
      const hide = () => { cursor.replaceChildren(); shown.hide(); };
      walkable(svg, chart.title, state, () => xs.length, show, hide);
      svg.addEventListener("pointermove", (event) => {
        const x = event.clientX - svg.getBoundingClientRect().left;
        let best = 0;
        xs.forEach((v, i) => { if (Math.abs(X(v) - x) < Math.abs(X(xs[best]) - x)) best = i; });
        show(best);
      });
    }
    return draw;
  }

  // Distances: a row per group, a mark for the students and one for the teacher.

  const MOST = 24;
  function distances(figure, chart) {
    const controls = figure.querySelector(".controls"), plot = figure.querySelector(".plot");
    const state = { at: null };
    let metric = chart.metrics[0], sorted = chart.rows.length > MOST, all = false;
    plot.replaceChildren();
    const shown = tip(plot);
    const select = element("select", "", null, controls);
    select.setAttribute("aria-label", "which figure");
    for (const m of chart.metrics) element("option", "", `${m.name} ${m.lower ? "↓" : "↑"}`, select).value = m.name;
    select.addEventListener("change", () => { metric = chart.metrics[select.selectedIndex]; draw(); });
    if (chart.rows.length > 4) {
      const made = button("sorted", sorted, controls, (on) => { sorted = on; draw(); });
      made.setAttribute("aria-label", "worst first");
    }
    if (chart.rows.length > MOST) button(`all ${chart.rows.length.toLocaleString("en")}`, all, controls, (on) => { all = on; draw(); });

    const value = (mark) => mark.values[metric.name];
    function chosen() {
      let rows = chart.rows.filter((r) => r.marks.some(value));
      const worst = (r) => { const m = r.marks.find((m) => m.who === "students" && value(m)) || r.marks.find(value); return value(m)[0] * (metric.lower ? 1 : -1); };
      if (sorted) rows = [...rows].sort((a, b) => worst(b) - worst(a));
      return all ? rows : rows.slice(0, MOST);
    }

    function draw() {
      shown.hide();
      plot.querySelector("svg")?.remove();
      const rows = chosen(), width = plot.clientWidth, step = 26, top = 20, bottom = 22;
      const left = Math.min(width * 0.36, 12 + 6.6 * Math.max(5, ...rows.map((r) => r.label.length)));
      const height = top + rows.length * step + bottom;
      const svg = node("svg", { width, height, viewBox: `0 0 ${width} ${height}` });
      plot.prepend(svg);
      if (!rows.length) { node("text", { x: 8, y: 16 }, svg, "not measured here"); return; }
      const halves = chart.halves[metric.name];
      const numbers = rows.flatMap((r) => r.marks.filter(value).flatMap(value));
      if (halves !== undefined) numbers.push(halves);
      let [low, high] = [Math.min(...numbers), Math.max(...numbers)];
      if (metric.lower && low > 0 && low < high * 0.6) low = 0;
      const pad = (high - low || Math.abs(high) || 1) * 0.04;
      [low, high] = [low === 0 ? 0 : low - pad, high + pad];
      const X = scale(low, high, left, width - 10, false);
      for (const t of ticks(low, high, Math.max(2, Math.floor((width - left) / 80)))) {
        node("line", { class: "gridline", x1: X(t), x2: X(t), y1: top, y2: height - bottom }, svg);
        node("text", { x: X(t), y: height - 6, "text-anchor": "middle" }, svg, short(t));
      }
      const bands = rows.map((r, i) => node("rect", { class: "rowband", x: 0, y: top + i * step, width, height: step, rx: 4 }, svg));
      if (halves !== undefined) {
        node("line", { class: "halves", x1: X(halves), x2: X(halves), y1: top - 4, y2: height - bottom }, svg);
        const end = X(halves) > width * 0.7;
        node("text", { x: X(halves) + (end ? 4 : -4), y: top - 8, "text-anchor": end ? "end" : "start" }, svg, "halves of the real data");
      }
      rows.forEach((r, i) => {
        const y = top + i * step + step / 2;
        const room = Math.floor((left - 10) / 6.4);
        node("text", { class: "name", x: 0, y: y + 4 }, svg, r.label.length > room ? `${r.label.slice(0, room - 1)}…` : r.label);
        r.marks.filter(value).forEach((m) => {
          const [v, a, b] = value(m), dy = m.who === "teacher" ? 4 : -4;
          if (a !== undefined) node("line", coloured({ class: "whisker", x1: X(a), x2: X(b), y1: y + dy, y2: y + dy }, m.hue), svg);
          node("circle", coloured({ class: m.who === "teacher" ? "ring" : "dot", cx: X(v), cy: y + dy, r: m.who === "teacher" ? 3.6 : 4.6 }, m.hue), svg);
        });
      });

      function show(i) {
        bands.forEach((band, j) => band.classList.toggle("on", i === j));
        const said = rows[i].marks.filter(value).map((m) => {
          const [v, a, b] = value(m);
          return [m.hue, m.who, exact(v) + (a === undefined ? "" : ` (${exact(a)} to ${exact(b)})`)];
        });
        return shown.show(left, top + (i + 1) * step + 2, `${rows[i].label}: ${metric.name}`, said);
      }
      const hide = () => { bands.forEach((band) => band.classList.remove("on")); shown.hide(); };
      walkable(svg, `${chart.title}: ${metric.name}`, state, () => rows.length, show, hide);
      svg.addEventListener("pointermove", (event) => {
        const i = Math.floor((event.clientY - svg.getBoundingClientRect().top - top) / step);
        if (i >= 0 && i < rows.length) show(i); else hide();
      });
    }
    return draw;
  }

  // The partition: classes from left to right, students from top to bottom.

  function maps(figure, chart) {
    const plot = figure.querySelector(".plot"), state = { at: null };
    plot.replaceChildren();
    const shown = tip(plot);
    const count = chart.owner.length;

    function draw() {
      shown.hide();
      plot.querySelector("svg")?.remove();
      const width = plot.clientWidth, left = chart.students > 40 ? 6 : 72, bottom = 30;
      const step = Math.max(3, Math.min(26, 420 / chart.students)), height = chart.students * step + bottom;
      const svg = node("svg", { width, height, viewBox: `0 0 ${width} ${height}` });
      plot.prepend(svg);
      const size = (width - left - 4) / count, gap = size > 8 ? 2 : 0;
      for (let k = 0; k < chart.students; k++) {
        node("line", { class: "gridline", x1: left, x2: width - 4, y1: (k + 0.5) * step, y2: (k + 0.5) * step }, svg);
        if (left > 10 && step >= 10) node("text", { x: 0, y: (k + 0.5) * step + 4 }, svg, `student ${k}`);
      }
      // Neighbouring classes of one owner are one rectangle where cells are too thin to be told apart.
      for (let i = 0; i < count; i++) {
        let end = i + 1;
        while (!gap && end < count && chart.owner[end] === chart.owner[i]) end++;
        const k = chart.owner[i];
        node("rect", coloured({ class: "cell", x: left + i * size + gap / 2, y: k * step + 1, width: Math.max(0.5, (end - i) * size - gap), height: step - 2, rx: gap ? 3 : 0 }, chart.hues[k]), svg);
        if (gap && step >= 14 && chart.names[i].length * 7 < size) node("text", { class: "within", x: left + (i + 0.5) * size, y: (k + 0.5) * step + 4 }, svg, chart.names[i]);
        i = end - 1;
      }
      const marks = count > 1 ? ticks(0, count - 1, Math.max(2, Math.floor((width - left) / 70))).filter(Number.isInteger) : [0];
      for (const t of marks) node("text", { x: left + (t + 0.5) * size, y: height - 15, "text-anchor": "middle" }, svg, String(t));
      node("text", { x: width - 4, y: height - 1, "text-anchor": "end" }, svg, chart.condition);
      const mark = node("rect", { class: "cell on", fill: "none", style: "fill: none", visibility: "hidden", rx: 2 }, svg);

      function show(i) {
        const k = chart.owner[i], wide = Math.max(size, 3);
        for (const [key, v] of Object.entries({ x: left + (i + 0.5) * size - wide / 2, y: k * step, width: wide, height: step, visibility: "visible" })) mark.setAttribute(key, v);
        const name = chart.names[i] === String(i) ? "" : chart.names[i];
        return shown.show(left + i * size, (k + 1) * step + 4, `${chart.condition} ${i}`, [...(name ? [[undefined, name, ""]] : []), [chart.hues[k], `student ${k}`, ""]]);
      }
      const hide = () => { mark.setAttribute("visibility", "hidden"); shown.hide(); };
      const label = `${count} ${chart.conditions}, ${chart.students} students`;
      walkable(svg, label, state, () => count, show, hide);
      svg.addEventListener("pointermove", (event) => {
        const i = Math.floor((event.clientX - svg.getBoundingClientRect().left - left) / size);
        if (i >= 0 && i < count) show(i); else hide();
      });
    }
    return draw;
  }

  // The page.

  const kinds = { curves, distances, maps };
  for (const figure of document.querySelectorAll("figure[data-chart]")) {
    const chart = data[figure.dataset.kind].find((c) => c.id === figure.dataset.chart);
    const draw = kinds[figure.dataset.kind](figure, chart);
    let drawn = 0;
    new ResizeObserver(() => {
      const width = figure.querySelector(".plot").clientWidth;
      if (width !== drawn) { drawn = width; draw(); }
    }).observe(figure);
  }

  const themes = document.querySelectorAll("[data-theme]:is(button)");
  function theme(name) {
    if (name === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    themes.forEach((b) => b.setAttribute("aria-pressed", String(b.dataset.theme === name)));
  }
  let kept = null;
  try { kept = localStorage.getItem("msd-theme"); } catch { /* a file may have no storage */ }
  if (kept === "light" || kept === "dark") theme(kept);
  themes.forEach((b) => b.addEventListener("click", () => {
    theme(b.dataset.theme);
    try { localStorage.setItem("msd-theme", b.dataset.theme); } catch { /* as above */ }
  }));
})();
