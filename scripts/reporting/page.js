// The page reads without this: it sorts and copies tables, searches classes, closes pictures.
const cells = (row) => [...row.cells];
const text = (cell) => cell.innerText.trim().replace(/\s+/g, " ").replace(/−/g, "-").replace(/[●■▲◆▼✚★╍]\s*/g, "");

const formats = {
  CSV: (rows) => rows.map((row) => row.map((cell) =>
    /[",]/.test(text(cell)) ? `"${text(cell).replace(/"/g, '""')}"` : text(cell)).join(",")).join("\n"),
  Markdown: (rows) => rows.map((row, i) => {
    const line = `| ${row.map((cell) => (cell.querySelector("b") ? `**${text(cell)}**` : text(cell)).replace(/\|/g, "\\|")).join(" | ")} |`;
    return i ? line : `${line}\n|${row.map((_, j) => (j ? "---:|" : "---|")).join("")}`;
  }).join("\n"),
  LaTeX: (rows) => {
    const tex = (cell) => {
      const escaped = text(cell).replace(/[&%$#_{}]/g, "\\$&").replace(/ ?✓/g, "").replace(/±/g, "$\\pm$").replace(/–/g, "--").replace(/^-(?=\d)/, "$-$");
      return cell.querySelector("b") ? `\\textbf{${escaped}}` : escaped;
    };
    const lines = rows.map((row) => `${row.map(tex).join(" & ")} \\\\`);
    return `\\begin{tabular}{l${"r".repeat(rows[0].length - 1)}}\n\\toprule\n${lines[0]}\n\\midrule\n`
      + `${lines.slice(1).join("\n")}\n\\bottomrule\n\\end{tabular}`;
  },
};

for (const table of document.querySelectorAll("table")) {
  const tools = document.createElement("span");
  tools.className = "tools";
  tools.append("copy as");
  for (const [name, format] of Object.entries(formats)) {
    const button = document.createElement("button");
    button.textContent = name;
    button.onclick = async () => {
      const rows = [...table.rows].filter((row) => !row.hidden).map(cells);
      try {
        await navigator.clipboard.writeText(format(rows));
        button.textContent = "copied";
      } catch {
        button.textContent = "refused";
      }
      setTimeout(() => { button.textContent = name; }, 1500);
    };
    tools.append(button);
  }
  table.closest("figure").querySelector("figcaption").append(tools);

  cells(table.tHead.rows[0]).forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      cells(head.parentNode).forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => parseFloat(text(row.cells[column]));
      const compare = (a, b) => {
        if (Number.isNaN(value(a)) && Number.isNaN(value(b)))
          return text(a.cells[column]).localeCompare(text(b.cells[column]), undefined, { numeric: true }) * (down ? 1 : -1);
        if (Number.isNaN(value(a))) return 1;
        if (Number.isNaN(value(b))) return -1;
        return (value(b) - value(a)) * (down ? 1 : -1);
      };
      for (const body of table.tBodies)
        body.append(...[...body.rows].sort((a, b) => b.classList.contains("mean") - a.classList.contains("mean") || compare(a, b)));
    };
  });
}

for (const search of document.querySelectorAll(".search")) {
  search.hidden = false;
  const section = search.closest("section");
  search.querySelector("input").oninput = ({ target }) => {
    const query = target.value.trim().toLowerCase();
    for (const row of section.querySelectorAll(".map:not(.means) tbody tr"))
      row.hidden = query !== "" && !text(row.cells[0]).toLowerCase().includes(query);
    for (const fold of section.querySelectorAll(".folded details")) {
      const match = fold.querySelector("tbody tr:not([hidden])");
      fold.hidden = !match;
      fold.open = query !== "" && match !== null;
    }
  };
}

addEventListener("keydown", ({ key }) => {
  const close = document.querySelector(".tile:target .close");
  if (key === "Escape" && close) close.click();
});
