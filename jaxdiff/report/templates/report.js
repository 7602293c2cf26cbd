"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// One of several panels, by a slider, buttons or a select: its value is the panel's place.
function show(chooser, place) {
  all("[data-panel]", chooser).forEach((panel, k) => (panel.hidden = k !== place));
  const slider = chooser.querySelector("input[type=range]");
  if (!slider) return;
  const label = all("[data-panel]", chooser)[place].dataset.label;
  slider.value = place;
  slider.setAttribute("aria-valuetext", `step ${label}`);
  chooser.querySelector("output").value = label;
}
for (const chooser of all("[data-chooser]")) {
  chooser.addEventListener("input", (event) => {
    if (!event.target.matches("[data-choose]")) return;
    const place = Number(event.target.value);
    show(chooser, place);
    if (!chooser.dataset.stage || !document.querySelector("#together")?.checked) return;
    const step = Number(all("[data-panel]", chooser)[place].dataset.step);
    for (const other of all(`[data-chooser][data-stage=${chooser.dataset.stage}]`)) {
      if (other === chooser) continue;
      const far = all("[data-panel]", other).map((panel) => Math.abs(Number(panel.dataset.step) - step));
      show(other, far.indexOf(Math.min(...far)));
    }
  });
}
// What the browser kept from before a reload is what is to be seen.
for (const input of all("[data-choose]")) {
  if (input.type !== "radio" || input.checked) show(input.closest("[data-chooser]"), Number(input.value));
}

// Pictures at whole multiples of their size, as large as the window allows.
const large = document.querySelector("#large");
for (const button of all(".zoom")) {
  button.addEventListener("click", () => {
    const from = button.querySelector("img"), to = large.querySelector("img");
    to.src = from.src;
    to.alt = from.alt;
    large.querySelector("p").textContent = button.dataset.caption;
    large.showModal();
    const room = large.querySelector(".canvas").clientWidth;
    const times = Math.max(1, Math.min(Math.floor(room / from.naturalWidth), Math.floor((innerHeight * 0.74) / from.naturalHeight)));
    to.style.width = `${times * from.naturalWidth}px`;
  });
}
large.addEventListener("click", (event) => event.target === large && large.close());

// Charts, in the page's colours, those of folded parts when these are opened.
const items = JSON.parse(document.querySelector("#charts").textContent);
const plots = new Map();
const dark = matchMedia("(prefers-color-scheme: dark)");
const run_inputs = all("[data-run]");

function paint(plot) {
  const style = getComputedStyle(document.documentElement);
  const [text, soft, line] = ["--text", "--soft", "--line"].map((name) => style.getPropertyValue(name).trim());
  for (const axis of [...plot.below, ...plot.left]) {
    axis.setv({
      axis_label_text_color: soft, major_label_text_color: soft, axis_line_color: line, major_tick_line_color: line,
      minor_tick_line_color: null, axis_label_text_font: "system-ui, sans-serif", axis_label_text_font_style: "normal",
      major_label_text_font: "system-ui, sans-serif", major_label_text_font_size: "12px", axis_label_text_font_size: "12px",
    });
  }
  for (const grid of plot.center) grid.setv({ grid_line_color: line });
}
function update(plot) {
  const axis = document.querySelector("[name=axis]:checked").value;
  const shown = new Map(run_inputs.map((input) => [input.dataset.run, input.checked]));
  for (const renderer of plot.renderers) {
    renderer.visible = shown.get(renderer.tags[0]) ?? true;
    renderer.glyph.x = { field: axis };
  }
  plot.below[0].axis_label = axis === "step" ? "step" : "images seen";
}
async function draw(figure) {
  const key = figure.dataset.chart;
  if (plots.has(key)) return;
  plots.set(key, null);
  const views = await Bokeh.embed.embed_item(items[key], figure.querySelector(".plot"));
  const plot = (views.roots ?? [...views])[0].model;
  plots.set(key, plot);
  // With a finger one scrolls; a mouse draws the box to zoom into.
  for (const tool of plot.toolbar.tools) if (tool.type === "BoxZoomTool") tool.active = matchMedia("(pointer: fine)").matches;
  paint(plot);
  update(plot);
}
const ready = () => [...plots.values()].filter(Boolean);
for (const figure of all("[data-chart]")) {
  const folded = figure.closest("details.more");
  if (folded) folded.addEventListener("toggle", () => folded.open && draw(figure));
  else draw(figure);
}
dark.addEventListener("change", () => ready().forEach(paint));
document.querySelector("#curve-controls")?.addEventListener("input", () => ready().forEach(update));

// The points of a chart as a file.
for (const button of all("[data-csv]")) {
  button.addEventListener("click", () => {
    const rows = [["run", "step", "images", "value", "smoothed"]];
    const done = new Set();
    for (const { data_source: source, name } of plots.get(button.dataset.csv).renderers) {
      if (done.has(source)) continue;
      done.add(source);
      const columns = ["step", "images", "value", "line"].map((column) => [...source.data[column]]);
      columns[0].forEach((_, k) => rows.push([JSON.stringify(name), ...columns.map((c) => (Number.isFinite(c[k]) ? c[k] : ""))]));
    }
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([rows.map((row) => row.join(",")).join("\n") + "\n"], { type: "text/csv" }));
    link.download = `${button.dataset.csv}.csv`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
}

// The section that is being read.
const links = new Map(all("nav a").map((link) => [link.hash.slice(1), link]));
const reading = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    links.forEach((link) => link.removeAttribute("aria-current"));
    const link = links.get(target.id), list = link.closest("ul");
    link.setAttribute("aria-current", "true");
    list.scrollLeft = link.offsetLeft - list.offsetLeft - 40;
  }
}, { rootMargin: "-30% 0px -65% 0px" });
all("main > section").forEach((section) => reading.observe(section));
