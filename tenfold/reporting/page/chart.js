// Charts as SVG, from the descriptions that charts.py documents. No library.
//
// Every chart is drawn to the width that it has, can be read with the mouse or with the arrow keys, and is announced.
"use strict";

const Charts = (() => {
  const SVG = "http://www.w3.org/2000/svg";
  const COLOURS = 6;

  function make(name, values, parent, words) {
    const node = document.createElementNS(SVG, name);
    Object.entries(values).forEach(([key, value]) => node.setAttribute(key, value));
    if (words !== undefined) node.textContent = words;
    if (parent) parent.append(node);
    return node;
  }

  function short(value, digits = 3) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    for (const [unit, name] of [[1e12, " T"], [1e9, " G"], [1e6, " M"], [1e3, " k"]]) {
      if (size >= unit) return `${Number((value / unit).toPrecision(digits))}${name}`;
    }
    return size < 1e-3 ? value.toExponential(digits - 3) : String(Number(value.toPrecision(digits)));
  }

  // Ticks in words: in as few digits as are right, so that no two read alike.
  function inWords(values) {
    const step = Math.min(...values.slice(1).map((v, i) => Math.abs(v - values[i])));
    const right = (digits) => values.every((v) => Math.abs(Number(v.toPrecision(digits)) - v) < step / 50);
    const digits = [3, 4, 5, 6, 7, 8].find(right) || 3;
    return values.map((v) => short(v, digits));
  }

  function ticks(low, high, wanted) {
    const raw = (high - low) / Math.max(wanted, 1);
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
    const found = [];
    for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-6; v += step) found.push(Number(v.toPrecision(12)));
    return found;
  }

  function decades(low, high, wanted) {
    const found = [];
    const first = Math.floor(Math.log10(low) + 1e-9);
    const last = Math.ceil(Math.log10(high) - 1e-9);
    const step = Math.max(1, Math.ceil((last - first) / wanted));
    for (let p = first; p <= last; p += step) found.push(10 ** p);
    return found.filter((v) => v >= low * 0.999 && v <= high * 1.001);
  }

  // Powers of ten; where there are few of them, numbers between.
  function logTicks(low, high, wanted) {
    const own = decades(low, high, wanted);
    if (own.length > 2 || high / low > 50) return own;
    const found = [];
    for (let p = Math.floor(Math.log10(low)); p <= Math.log10(high); p += 1) {
      [1, 2, 5].forEach((m) => { const v = Number((m * 10 ** p).toPrecision(3)); if (v >= low && v <= high * 1.001) found.push(v); });
    }
    return found.length > 1 ? found : [low, high];
  }

  // A scale from numbers to pixels. Logarithmic ones begin at the smallest positive number.
  function scale(values, axis, from, to) {
    let own = values.filter((v) => Number.isFinite(v) && (!axis.log || v > 0));
    if (!own.length) own = [axis.log ? 1 : 0];
    let low = axis.min === undefined ? Math.min(...own) : axis.min;
    let high = axis.max === undefined ? Math.max(...own) : axis.max;
    if (axis.log) {
      if (high / low < 10) { low /= 2; high *= 2; }
      const span = Math.log(high / low);
      const at = (v) => from + ((to - from) * Math.log(Math.max(v, low) / low)) / span;
      return { at, ticks: (n) => logTicks(low, high, n) };
    }
    if (high === low) { const pad = Math.abs(high) * 0.1 || 1; low -= pad; high += pad; }
    const pad = (high - low) * 0.06;
    if (axis.min === undefined) low = low >= 0 && low < (high - low) * 0.6 ? 0 : low - pad;
    if (axis.max === undefined) high += pad;
    return { at: (v) => from + ((to - from) * (v - low)) / (high - low), ticks: (n) => ticks(low, high, n), low };
  }

  function marker(parent, kind, x, y, r, css) {
    const shapes = [
      () => make("circle", { cx: x, cy: y, r, class: css }, parent),
      () => make("rect", { x: x - r, y: y - r, width: 2 * r, height: 2 * r, class: css }, parent),
      () => make("path", { d: `M${x} ${y - r * 1.2}L${x + r * 1.2} ${y + r}H${x - r * 1.2}Z`, class: css }, parent),
      () => make("path", { d: `M${x} ${y - r * 1.3}L${x + r * 1.3} ${y}L${x} ${y + r * 1.3}L${x - r * 1.3} ${y}Z`, class: css }, parent),
    ];
    return shapes[kind % shapes.length]();
  }

  function frame(svg, spec, box, x, y) {
    const { left, right, top, bottom, width, height } = box;
    const upward = y.ticks(Math.max(2, Math.round((bottom - top) / 45)));
    const words = inWords(upward);
    upward.forEach((v, i) => {
      const at = y.at(v);
      make("line", { x1: left, x2: right, y1: at, y2: at, class: "grid" }, svg);
      make("text", { x: left - 7, y: at + 4, "text-anchor": "end" }, svg, words[i]);
    });
    make("line", { x1: left, x2: right, y1: bottom, y2: bottom, class: "axis" }, svg);
    if (x) {
      const along = x.ticks(Math.max(2, Math.round((right - left) / 80)));
      const own = inWords(along);
      along.forEach((v, i) => {
        make("line", { x1: x.at(v), x2: x.at(v), y1: bottom, y2: bottom + 4, class: "axis" }, svg);
        make("text", { x: x.at(v), y: bottom + 18, "text-anchor": "middle" }, svg, own[i]);
      });
    }
    make("text", { x: (left + right) / 2, y: height - 4, "text-anchor": "middle" }, svg, spec.x.label);
    make("text", { x: 0, y: 11 }, svg, spec.y.label);
    return width;
  }

  function boxOf(width, spec) {
    const height = Math.round(Math.min(330, Math.max(230, width * (spec.type === "bars" ? 0.32 : 0.56))));
    return { width, height, left: 52, right: width - 14, top: 26, bottom: height - 42 };
  }

  function drawXY(svg, spec, box) {
    const all = spec.series.flatMap((s) => [...s.points, ...(s.fit || [])]);
    const rings = spec.rings || [];
    const rules = spec.rules || [];
    const spread = all.flatMap((p) => (p[3] === undefined || p[3] === null ? [] : [p[1] - p[3], p[1] + p[3]]));
    const xs = [...all.map((p) => p[0]), ...rings.map((r) => r.x), ...rules.filter((r) => r.x !== undefined).map((r) => r.x)];
    const ys = [...all.map((p) => p[1]), ...spread, ...rings.map((r) => r.y), ...rules.filter((r) => r.y !== undefined).map((r) => r.y)];
    const x = scale(xs, spec.x, box.left, box.right);
    const y = scale(ys, spec.y, box.bottom, box.top);
    frame(svg, spec, box, x, y);
    rules.forEach((rule) => {
      if (rule.y !== undefined) {
        make("line", { x1: box.left, x2: box.right, y1: y.at(rule.y), y2: y.at(rule.y), class: "rule" }, svg);
        const under = y.at(rule.y) < box.top + 14;
        make("text", { x: box.right, y: y.at(rule.y) + (under ? 14 : -5), "text-anchor": "end", class: "halo" }, svg, rule.label);
      } else {
        const colour = rule.colour === undefined ? "rule" : `rule s${rule.colour % COLOURS}`;
        make("line", { x1: x.at(rule.x), x2: x.at(rule.x), y1: box.top, y2: box.bottom, class: colour }, svg);
        const flip = x.at(rule.x) > (box.left + box.right) / 2;
        const row = box.top + 12 + 15 * (rule.row || 0);
        make("text", { x: x.at(rule.x) + (flip ? -5 : 5), y: row, "text-anchor": flip ? "end" : "start", class: "halo" }, svg, rule.label);
      }
    });
    const spots = [];
    spec.series.forEach((series, number) => {
      const c = (series.colour === undefined ? number : series.colour) % COLOURS;
      const usable = series.points.filter((p) => (!spec.y.log || p[1] > 0) && (!spec.x.log || p[0] > 0));
      const places = usable.map((p) => [x.at(p[0]), y.at(p[1])]);
      const way = series.fit ? series.fit.map((p) => [x.at(p[0]), y.at(p[1])]) : places;
      if (series.line !== false && way.length > 1) {
        make("polyline", { points: way.map((p) => p.map((v) => v.toFixed(1)).join(",")).join(" "), class: `line s${c}` }, svg);
      }
      places.forEach((place, i) => {
        const point = usable[i];
        if (point[3]) make("line", { x1: place[0], x2: place[0], y1: y.at(point[1] - point[3]), y2: y.at(point[1] + point[3]), class: `whisker s${c}` }, svg);
        if (series.dots !== false) marker(svg, c, place[0], place[1], places.length > 30 ? 2.2 : 3.6, `f${c}`);
        const words = point[2] || `${series.name}\n${spec.x.label}: ${short(point[0])}\n${spec.y.label}: ${short(point[1])}`;
        spots.push({ x: place[0], y: place[1], words, name: point[4] });
      });
    });
    rings.forEach((ring) => {
      const place = [x.at(ring.x), y.at(ring.y)];
      make("circle", { cx: place[0], cy: place[1], r: 8, class: "ring" }, svg);
      const flip = place[0] > (box.left + box.right) / 2;
      const down = place[1] < box.top + 24;
      make("text", { x: place[0] + (flip ? -12 : 12), y: place[1] + (down ? 20 : -10), "text-anchor": flip ? "end" : "start", class: "strong halo" }, svg, ring.label);
      spots.push({ x: place[0], y: place[1], words: ring.words || ring.label });
    });
    nameSpots(svg, spots, box);
    return spots;
  }

  // The names of points, each on the first side where there is room; where there is none, the tooltip has it.
  function nameSpots(svg, spots, box) {
    const taken = spots.map((s) => [s.x - 5, s.y - 5, s.x + 5, s.y + 5]);
    svg.querySelectorAll("text.halo").forEach((text) => {
      const b = text.getBBox();
      taken.push([b.x, b.y, b.x + b.width, b.y + b.height]);
    });
    spots.filter((s) => s.name).forEach((spot) => {
      const text = make("text", { class: "halo name" }, svg, spot.name);
      const wide = text.getComputedTextLength();
      const free = [[8, 4], [-8 - wide, 4], [-wide / 2, -9], [-wide / 2, 18]].map(([dx, dy]) => [spot.x + dx, spot.y + dy]).find(([x, y]) => {
        const own = [x, y - 11, x + wide, y + 3];
        const inside = own[0] >= box.left && own[2] <= box.right + 10 && own[1] >= 0 && own[3] <= box.bottom;
        return inside && taken.every((t) => own[2] < t[0] || own[0] > t[2] || own[3] < t[1] || own[1] > t[3]);
      });
      if (!free) { text.remove(); return; }
      text.setAttribute("x", free[0]);
      text.setAttribute("y", free[1]);
      taken.push([free[0], free[1] - 11, free[0] + wide, free[1] + 3]);
    });
  }

  function drawBars(svg, spec, box) {
    const tops = spec.series.flatMap((s) => s.values);
    const y = scale([0, ...tops], { ...spec.y, min: 0 }, box.bottom, box.top);
    frame(svg, spec, box, null, y);
    const step = (box.right - box.left) / spec.names.length;
    const wide = Math.max(1, Math.min(step * 0.78, 46));
    const spots = [];
    spec.names.forEach((name, i) => {
      const middle = box.left + step * (i + 0.5);
      spec.series.forEach((series, number) => {
        const top = y.at(series.values[i]);
        const css = number === 0 ? "pale" : `f${number - 1}`;
        const own = number === 0 ? wide : wide * (wide > 6 ? 0.62 : 1);
        make("rect", { x: middle - own / 2, y: top, width: own, height: Math.max(box.bottom - top, 0), class: css }, svg);
      });
      const lines = spec.series.map((s) => `${s.name}: ${short(s.values[i])}`);
      if (spec.notes) lines.push(spec.notes[i]);
      spots.push({ x: middle, y: y.at(spec.series[0].values[i]), words: [name, ...lines].join("\n") });
    });
    return spots;
  }

  function legend(host, spec) {
    if (spec.series.length < 2 && !spec.legend) return;
    const list = document.createElement("ul");
    list.className = "legend";
    spec.series.forEach((series, number) => {
      const item = document.createElement("li");
      const svg = make("svg", { viewBox: "0 0 16 12", "aria-hidden": "true" }, item);
      if (spec.type === "bars") {
        make("rect", { x: 2, y: 1, width: 12, height: 10, class: number === 0 ? "plain" : `f${number - 1}` }, svg);
        if (number === 0) svg.firstChild.setAttribute("fill", "var(--pale)");
      } else {
        const c = (series.colour === undefined ? number : series.colour) % COLOURS;
        if (series.line !== false) make("line", { x1: 0, x2: 16, y1: 6, y2: 6, class: `s${c}`, "stroke-width": 2 }, svg);
        if (series.dots !== false) marker(svg, c, 8, 6, 3.6, `f${c}`);
      }
      item.append(series.name);
      list.append(item);
    });
    host.append(list);
  }

  function readable(host, svg, spots) {
    const tip = document.createElement("div");
    tip.className = "tip";
    tip.hidden = true;
    host.append(tip);
    const live = document.createElement("div");
    live.className = "hidden";
    live.setAttribute("aria-live", "polite");
    host.append(live);
    const cursor = make("circle", { r: 6, class: "cursor", visibility: "hidden" }, svg);
    let now = -1;
    function show(index, spoken) {
      now = index;
      const spot = spots[index];
      cursor.setAttribute("cx", spot.x);
      cursor.setAttribute("cy", spot.y);
      cursor.setAttribute("visibility", "visible");
      tip.textContent = spot.words;
      tip.hidden = false;
      const ratio = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
      const room = host.clientWidth - tip.offsetWidth;
      tip.style.left = `${Math.max(0, Math.min(spot.x * ratio + 12, room))}px`;
      tip.style.top = `${Math.max(0, spot.y * ratio - tip.offsetHeight - 10)}px`;
      if (spoken) live.textContent = spot.words;
    }
    function hide() {
      tip.hidden = true;
      cursor.setAttribute("visibility", "hidden");
    }
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const ratio = svg.viewBox.baseVal.width / box.width;
      const [x, y] = [(event.clientX - box.left) * ratio, (event.clientY - box.top) * ratio];
      let best = -1;
      let least = Infinity;
      spots.forEach((spot, i) => {
        const far = (spot.x - x) ** 2 + ((spot.y - y) * 0.5) ** 2;
        if (far < least) { least = far; best = i; }
      });
      if (best >= 0) show(best, false);
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (event.key === "Escape") hide();
      if (step === undefined || !spots.length) return;
      event.preventDefault();
      show((now + step + spots.length) % spots.length, true);
    });
  }

  function draw(host, spec) {
    const width = Math.max(260, Math.round(host.clientWidth || 600));
    const box = boxOf(width, spec);
    host.replaceChildren();
    const svg = make("svg", { viewBox: `0 0 ${box.width} ${box.height}`, role: "img", tabindex: "0", "aria-label": spec.alt || spec.y.label }, host);
    const spots = spec.type === "bars" ? drawBars(svg, spec, box) : drawXY(svg, spec, box);
    legend(host, spec);
    readable(host, svg, spots);
  }

  const drawn = new Map();
  const watch = new ResizeObserver((entries) => entries.forEach(({ target }) => {
    const known = drawn.get(target);
    if (known && Math.abs(known.width - target.clientWidth) > 1) place(target, known.spec);
  }));

  function place(host, spec) {
    drawn.set(host, { spec, width: host.clientWidth });
    draw(host, spec);
    watch.observe(host);
  }

  return { place };
})();
