"use strict";
for (const section of document.querySelectorAll("section")) {
  const table = section.querySelector("table.sortable");
  if (!table) continue;
  const body = table.tBodies[0], rows = [...body.rows], search = section.querySelector("input");
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/);
    for (const row of rows) row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
    section.querySelector("output").value = `${rows.filter(row => !row.hidden).length} of ${rows.length}`;
  };
  search.addEventListener("input", filter);
  filter();
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const numeric = head.className === "number";
    const key = row => {
      const text = row.cells[column].textContent;
      return numeric ? (Number.isNaN(parseFloat(text)) ? -Infinity : parseFloat(text)) : text;
    };
    const compare = (a, b) => numeric ? Math.sign(key(a) - key(b)) || 0 : key(a).localeCompare(key(b));
    body.append(...rows.sort((a, b) => down ? compare(b, a) : compare(a, b)));
  }));
}
