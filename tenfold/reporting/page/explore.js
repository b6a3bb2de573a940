// The explorer: every move sends a request to the local server and shows its answer.
"use strict";

(() => {
  const data = JSON.parse(document.getElementById("data").textContent).explore;
  const query = { budget: { ...data.query.budget }, overrides: {} };
  const rows = Array.from(document.querySelectorAll("#layer-table tbody tr")).sort((a, b) => a.dataset.layer - b.dataset.layer);
  const budgets = new Map(Array.from(document.querySelectorAll(".budget"), (box) => [box.dataset.kind, box]));
  const problem = document.querySelector(".problem");
  const saved = document.getElementById("saved");
  const against = document.getElementById("against");
  const curves = new Map();
  let current = data.selection;

  // ---- requests

  async function post(what, value) {
    let response;
    try {
      response = await fetch(what, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(value) });
    } catch {
      throw new Error("The server of this page does not answer. Was it stopped?");
    }
    const found = await response.json().catch(() => ({ error: `the server answered ${response.status}` }));
    if (!response.ok || found.error) throw new Error(found.error);
    return found;
  }

  // One request at a time; of what is moved meanwhile, only the latest state is requested next.
  let asking = false;
  let moved = false;
  let good = JSON.stringify(query); // the last that could be met
  async function ask() {
    moved = true;
    if (asking) return;
    asking = true;
    while (moved) {
      moved = false;
      document.body.setAttribute("aria-busy", "true");
      const asked = JSON.stringify(query);
      try {
        const found = await post("select", query);
        good = asked;
        complain("");
        if (!moved) show(found);
      } catch (error) {
        complain(error.message);
        if (!moved) {
          Object.assign(query, JSON.parse(good));
          show(current);
        }
      }
    }
    document.body.removeAttribute("aria-busy");
    asking = false;
  }

  function complain(text) {
    problem.textContent = text;
    problem.hidden = !text;
  }

  // ---- showing

  function show(found) {
    current = found;
    found.tiles.forEach(showTile);
    data.budgets.forEach(showBudget);
    found.layers.forEach((layer, i) => showLayer(rows[i], data.layers[i], layer));
    document.getElementById("summary").textContent = found.summary;
    const search = document.getElementById("search");
    search.dispatchEvent(new Event("input"));
    drawCurve();
  }

  function showTile(tile) {
    const host = document.querySelector(`[data-tile="${tile.id}"]`);
    host.querySelector(".change").textContent = tile.change;
    host.querySelector(".values").textContent = tile.values;
    host.querySelector(".note").textContent = tile.note;
    const part = host.querySelector(".bar .part");
    if (part) part.setAttribute("width", Math.min(100, 100 * tile.share).toFixed(1));
  }

  function percent(share) {
    return Number((100 * share).toFixed(2));
  }

  function showBudget(known) {
    const box = budgets.get(known.kind);
    // An absolute limit is always that of the plan: what is moved are shares.
    const asked = query.budget[known.limit] === undefined ? query.budget[known.kind] : known.asked;
    const share = asked === undefined ? current.left[known.kind] : asked;
    box.querySelector(".asked").checked = asked !== undefined;
    box.classList.toggle("off", asked === undefined);
    const [range, number] = box.querySelectorAll("input[type=range], input[type=number]");
    if (document.activeElement !== range) range.value = percent(share);
    if (document.activeElement !== number) number.value = percent(share);
    range.setAttribute("aria-valuetext", `${percent(share)} percent`);
    const left = current.left[known.kind];
    const over = asked !== undefined && left > share * (1 + 1e-6);
    const note = over ? "That is more than asked for: all layers are pinned." : asked === undefined ? "Not asked for." : "";
    const now = box.querySelector(".now");
    now.textContent = `${percent(left).toFixed(2)} % are left now; the least is ${percent(known.least).toFixed(2)} %. ${note}`;
    now.classList.toggle("bad", over);
  }

  // The steps of a slider: those of its format, the one that is chosen among them, and at the end the layer kept.
  function stepsOf(known, layer, format) {
    const own = (known.formats[format] || []).slice();
    if (layer.format === format && !own.some((step) => step[0] === layer.option)) {
      own.push([layer.option, layer.rank, layer.cost]);
      own.sort((a, b) => a[2] - b[2]);
    }
    return own;
  }

  function showLayer(row, known, layer) {
    const format = layer.format === null ? row.dataset.format || Object.keys(known.formats)[0] || "" : layer.format;
    row.dataset.format = format;
    const steps = stepsOf(known, layer, format);
    const slider = row.querySelector(".rank");
    slider.max = steps.length;
    slider.value = layer.format === null ? steps.length : steps.findIndex((step) => step[0] === layer.option);
    slider.disabled = steps.length === 0;
    slider.setAttribute("aria-valuetext", layer.format === null ? "kept" : `${layer.format} ${layer.rank}`);
    row.querySelector("output").textContent = layer.rank;
    row.querySelector(".planned").textContent = layer.planned ? `planned: ${layer.planned}` : "";
    row.querySelector(".format").value = layer.format === null ? "" : layer.format;
    row.querySelector(".pin").checked = layer.pinned;
    row.classList.toggle("pinned", layer.pinned);
    row.dataset.kind = layer.pinned ? "pinned" : layer.format === null ? "keep" : "factorize";
    row.querySelectorAll("[data-cell]").forEach((cell) => {
      const [text, value] = layer.cells[cell.dataset.cell];
      cell.textContent = text;
      cell.dataset.value = value === null ? "" : value;
    });
  }

  // ---- the curve

  async function drawCurve() {
    const kind = against.value;
    if (!curves.has(kind)) {
      curves.set(kind, null);
      try {
        curves.set(kind, (await post("curve", { kind })).points);
      } catch {
        curves.delete(kind);
        return;
      }
      if (against.value !== kind) return;
    }
    const points = curves.get(kind);
    if (points === null) return;
    const name = data.budgets.find((budget) => budget.kind === kind).name;
    const y = current.distortion;
    const x = percent(current.left[kind]);
    const high = points.map((point) => point[1]).filter((v) => v > 0);
    Charts.place(document.getElementById("curve"), {
      type: "xy",
      alt: `predicted distortion against ${name} left`,
      x: { label: `${name} left (%)`, max: 100 },
      y: { label: "predicted distortion", log: high.length > 1 && Math.max(...high) > 50 * Math.min(...high) },
      series: [{ name: "least distortion", points: points.map((p) => [100 * p[0], p[1], `${percent(p[0])} % left\ndistortion ${Number(p[1].toPrecision(3))}`]) }],
      rings: [{ x, y, label: "now", words: `now: ${x} % left\ndistortion ${Number(y.toPrecision(3))}` }],
    });
  }

  // ---- moving

  function touched() {
    saved.textContent = "Not saved yet.";
    ask();
  }

  function pin(i, value) {
    if (value === undefined) delete query.overrides[data.layers[i].path];
    else query.overrides[data.layers[i].path] = value;
    touched();
  }

  function pinAsIs(layer) {
    return layer.format === null ? { format: null } : { format: layer.format, option: layer.option };
  }

  function startBudget(known) {
    const box = budgets.get(known.kind);
    const [range, number] = box.querySelectorAll("input[type=range], input[type=number]");
    range.min = Math.ceil(200 * known.least) / 2;
    number.min = range.min;
    function set(value) {
      if (!(value > 0)) return;
      delete query.budget[known.limit];
      query.budget[known.kind] = Number((value / 100).toPrecision(9));
      against.value = known.kind;
      range.setAttribute("aria-valuetext", `${value} percent`);
      touched();
    }
    range.addEventListener("input", () => { number.value = range.value; set(Number(range.value)); });
    number.addEventListener("change", () => { range.value = number.value; set(Math.min(100, Number(number.value))); });
    box.querySelector(".asked").addEventListener("change", (event) => {
      if (event.target.checked) set(Math.max(percent(current.left[known.kind]), Number(range.min)));
      else { delete query.budget[known.kind]; delete query.budget[known.limit]; touched(); }
    });
  }

  function startLayer(row, i) {
    const known = data.layers[i];
    const slider = row.querySelector(".rank");
    slider.addEventListener("input", () => {
      const step = stepsOf(known, current.layers[i], row.dataset.format)[Number(slider.value)];
      row.querySelector("output").textContent = step ? step[1] : "kept";
      slider.setAttribute("aria-valuetext", step ? `${row.dataset.format} ${step[1]}` : "kept");
      pin(i, step ? { format: row.dataset.format, option: step[0] } : { format: null });
    });
    row.querySelector(".format").addEventListener("change", (event) => {
      const format = event.target.value;
      if (!format) { pin(i, { format: null }); return; }
      const cost = current.layers[i].cost;
      const near = known.formats[format].reduce((a, b) => (Math.abs(b[2] - cost) < Math.abs(a[2] - cost) ? b : a));
      row.dataset.format = format;
      pin(i, { format, option: near[0] });
    });
    row.querySelector(".pin").addEventListener("change", (event) => pin(i, event.target.checked ? pinAsIs(current.layers[i]) : undefined));
  }

  data.budgets.forEach(startBudget);
  rows.forEach(startLayer);
  against.value = (data.budgets.find((known) => known.asked !== null) || data.budgets[0]).kind;
  against.addEventListener("change", drawCurve);
  document.getElementById("release").addEventListener("click", () => { query.overrides = {}; touched(); });
  document.getElementById("hold").addEventListener("click", () => {
    current.layers.forEach((layer, i) => { query.overrides[data.layers[i].path] = pinAsIs(layer); });
    touched();
  });
  document.getElementById("reset").addEventListener("click", () => {
    query.budget = { ...data.query.budget };
    touched();
  });
  document.getElementById("save").addEventListener("click", async () => {
    try {
      const found = await post("save", query);
      const code = document.createElement("code");
      code.textContent = found.command;
      saved.replaceChildren(`Saved in ${found.out}, ${found.factorized} layers factorized. Carry it out with `, code);
      complain("");
    } catch (error) {
      saved.textContent = "Not saved.";
      complain(error.message);
    }
  });
  show(current);
})();
