// Starts the page: light or dark, tables, charts, and the picture of one layer that a person chooses.
"use strict";

(() => {
  const root = document.documentElement;
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const button = document.querySelector(".theme");
  const data = JSON.parse(document.getElementById("data").textContent);

  function isDark() {
    return root.dataset.theme ? root.dataset.theme === "dark" : system.matches;
  }
  function label() {
    button.textContent = isDark() ? "☀ Light" : "☾ Dark";
    button.setAttribute("aria-pressed", String(isDark()));
  }
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    label();
  });
  system.addEventListener("change", label);
  label();

  function layers(host) {
    const choice = host.querySelector("select");
    const [spectrum, curve] = host.querySelectorAll(".plot");
    function show(path) {
      const found = data.layers.find((layer) => layer.path === path) || data.layers[0];
      choice.value = found.path;
      Charts.place(spectrum, found.spectrum);
      curve.closest("figure").hidden = !found.curve;
      if (found.curve) Charts.place(curve, found.curve);
      host.querySelector(".which").textContent = found.words;
    }
    function step(by) {
      const now = data.layers.findIndex((layer) => layer.path === choice.value);
      show(data.layers[(now + by + data.layers.length) % data.layers.length].path);
    }
    choice.addEventListener("change", () => show(choice.value));
    host.querySelector(".before").addEventListener("click", () => step(-1));
    host.querySelector(".next").addEventListener("click", () => step(1));
    document.querySelectorAll("button.go").forEach((go) => go.addEventListener("click", () => {
      show(go.dataset.layer);
      host.scrollIntoView();
      choice.focus({ preventScroll: true });
    }));
    show(data.layers[0].path);
  }

  Tables.start();
  document.querySelectorAll(".plot[data-chart]").forEach((host) => Charts.place(host, data.charts[host.dataset.chart]));
  const own = document.getElementById("layer");
  if (own && data.layers && data.layers.length) layers(own);
})();
