// Tables that sort by a click or a key on their heads, and that a search field and a choice narrow down.
"use strict";

const Tables = (() => {
  const text = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });

  function valueOf(row, column) {
    const cell = row.cells[column];
    const value = cell.dataset.value;
    if (value === undefined) return cell.textContent.trim();
    return value === "" ? null : Number(value);
  }

  // What nobody measured comes last, whichever way the rest is sorted.
  function compare(a, b, sign) {
    if (a === null || b === null) return (a === null) - (b === null);
    return sign * (typeof a === "number" && typeof b === "number" ? a - b : text.compare(a, b));
  }

  function sort(table, column, direction) {
    const body = table.tBodies[0];
    const sign = direction === "descending" ? -1 : 1;
    const rows = Array.from(body.rows, (row) => [valueOf(row, column), row]);
    rows.sort((a, b) => compare(a[0], b[0], sign));
    body.append(...rows.map((pair) => pair[1]));
    Array.from(table.tHead.rows[0].cells).forEach((head, i) => {
      if (head.querySelector("button")) head.setAttribute("aria-sort", i === column ? direction : "none");
    });
  }

  // The first click shows what one looks for: the largest numbers, the first words.
  function sortable(table) {
    Array.from(table.tHead.rows[0].cells).forEach((head, column) => {
      const button = head.querySelector("button");
      if (!button) return;
      button.addEventListener("click", () => {
        const first = head.classList.contains("n") ? "descending" : "ascending";
        const other = first === "ascending" ? "descending" : "ascending";
        sort(table, column, head.getAttribute("aria-sort") === first ? other : first);
      });
    });
  }

  function filterable(table, tools) {
    const search = tools.querySelector("input[type=search]");
    const choice = tools.querySelector("select");
    const count = tools.querySelector(".count");
    const rows = Array.from(table.tBodies[0].rows);
    const words = rows.map((row) => row.textContent.toLowerCase());
    function narrow() {
      const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const kind = choice ? choice.value : "";
      let shown = 0;
      rows.forEach((row, i) => {
        // Norms are folded away until they are asked for, by the choice or by a search.
        const open = kind === "all" || (kind ? row.dataset.kind === kind : wanted.length > 0 || row.dataset.kind !== "norm");
        const fits = open && wanted.every((word) => words[i].includes(word));
        row.hidden = !fits;
        shown += fits;
      });
      count.textContent = `${shown} of ${rows.length} shown`;
    }
    search.addEventListener("input", narrow);
    if (choice) choice.addEventListener("change", narrow);
    narrow();
  }

  function start() {
    document.querySelectorAll("table.sortable").forEach(sortable);
    document.querySelectorAll(".tools[data-for]").forEach((tools) => {
      filterable(document.getElementById(tools.dataset.for), tools);
    });
  }

  return { start, sort };
})();
