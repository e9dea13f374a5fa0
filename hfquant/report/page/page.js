"use strict";
// Sort by the column whose heading is pressed; again turns the order round.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const heading = button.closest("th"), table = heading.closest("table"), body = table.tBodies[0];
    const rising = heading.getAttribute("aria-sort") !== "ascending";
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const value = (row) => row.cells[heading.cellIndex].dataset.value ?? row.cells[heading.cellIndex].textContent;
    const numeric = heading.classList.contains("n");
    const rows = [...body.rows].sort((a, b) => {
      const x = value(a), y = value(b);
      if (numeric && (x === "" || y === "")) return (x === "") - (y === "");
      const order = numeric ? Number(x) - Number(y) : x.localeCompare(y, undefined, { numeric: true });
      return rising ? order : -order;
    });
    body.append(...rows);
  });
}
// Show only the layers whose name holds the words, of one block and of one kind.
for (const controls of document.querySelectorAll(".controls")) {
  const table = document.getElementById(controls.dataset.for), count = controls.querySelector("output");
  const update = () => {
    const [name, block, kind] = ["name", "block", "kind"].map((key) => controls.querySelector(`[name=${key}]`).value);
    let shown = 0;
    for (const row of table.tBodies[0].rows) {
      const fits = row.dataset.name.includes(name) && (!block || row.dataset.block === block) &&
        (!kind || row.dataset.kind === kind);
      row.hidden = !fits;
      shown += fits;
    }
    count.textContent = `${shown} of ${table.tBodies[0].rows.length} layers`;
  };
  controls.addEventListener("input", update);
}
// The slider moves the edge between the two pictures.
for (const slider of document.querySelectorAll(".pair input")) {
  slider.addEventListener("input", () => slider.closest(".pair").style.setProperty("--cut", `${slider.value}%`));
}
for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", async () => {
    const text = document.getElementById(button.dataset.for).textContent;
    try { await navigator.clipboard.writeText(text); } catch {
      const area = Object.assign(document.createElement("textarea"), { value: text });
      document.body.append(area); area.select(); document.execCommand("copy"); area.remove();
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}
