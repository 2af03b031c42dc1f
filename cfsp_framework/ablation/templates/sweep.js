(() => {
  "use strict";
  const table = document.querySelector("#cells");
  if (table) {
    const rows = [...table.tBodies].filter((body) => body.dataset.words !== undefined);
    const shown = document.querySelector("#shown");
    const search = document.querySelector("#search");
    let ratio = "";

    // Sorting: numbers by value and words by alphabet; what has no number stays last either way.
    const value = (body, column) => body.rows[0].cells[column]?.dataset.sort ?? "";  // a failed row's error spans columns
    const compare = (first, second, words) => {
      if (first === "" || second === "") return { last: (first === "") - (second === "") };
      return { order: words ? first.localeCompare(second, "en", { numeric: true }) : parseFloat(first) - parseFloat(second) };
    };
    for (const button of table.querySelectorAll("th button")) {
      const heading = button.closest("th");
      button.addEventListener("click", () => {
        const before = heading.getAttribute("aria-sort");
        const up = before ? before !== "ascending" : heading.dataset.first !== "descending";
        for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
        heading.setAttribute("aria-sort", up ? "ascending" : "descending");
        const column = Number(heading.dataset.column), words = heading.dataset.kind === "words";
        const sorted = rows.map((body, place) => ({ body, place, key: value(body, column) }));
        sorted.sort((a, b) => {
          const found = compare(a.key, b.key, words);
          return found.last || (up ? found.order : -found.order) || a.place - b.place;
        });
        table.append(...sorted.map((one) => one.body));
      });
    }

    const filter = () => {
      const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let count = 0;
      for (const body of rows) {
        const fits = wanted.every((word) => body.dataset.words.includes(word)) && (!ratio || body.dataset.ratio === ratio);
        body.hidden = !fits;
        count += fits;
      }
      const all = rows.length === 1 ? "1 row" : `${rows.length} rows`;
      shown.textContent = count === rows.length ? all : `${count} of ${all}`;
    };
    search.addEventListener("input", filter);
    for (const button of document.querySelectorAll("#ratios button")) {
      button.addEventListener("click", () => {
        ratio = button.value;
        for (const other of document.querySelectorAll("#ratios button")) other.setAttribute("aria-pressed", other === button);
        filter();
      });
    }
    filter();

    table.addEventListener("click", (event) => {
      const opener = event.target.closest("button.open");
      if (!opener) return;
      const detail = opener.closest("tbody").rows[1];
      detail.hidden = !detail.hidden;
      opener.setAttribute("aria-expanded", String(!detail.hidden));
    });
  }

  const fallback = (text) => {
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  };
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("button.copy");
    if (!button) return;
    const text = button.parentElement.querySelector("code").textContent;
    try { await navigator.clipboard.writeText(text); } catch { fallback(text); }
    button.textContent = "copied";
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  });

  // A method under the mouse, or chosen from the list, stands out in every curve.
  const mark = (place) => {
    document.querySelectorAll(".curves").forEach((one) => one.classList.toggle("marking", place !== null));
    document.querySelectorAll(".curves .marked, .order .marked").forEach((one) => one.classList.remove("marked"));
    if (place !== null) document.querySelectorAll(`.curves .s${place}, .order [data-place="${place}"]`).forEach((one) => one.classList.add("marked"));
  };
  for (const item of document.querySelectorAll(".order [data-place]")) {
    item.addEventListener("mouseenter", () => mark(item.dataset.place));
    item.addEventListener("mouseleave", () => mark(null));
    item.addEventListener("focus", () => mark(item.dataset.place));
    item.addEventListener("blur", () => mark(null));
  }
  for (const line of document.querySelectorAll('.curves [class^="s"]')) {
    line.addEventListener("mouseenter", () => mark(line.getAttribute("class").split(" ")[0].slice(1)));
    line.addEventListener("mouseleave", () => mark(null));
  }
})();
