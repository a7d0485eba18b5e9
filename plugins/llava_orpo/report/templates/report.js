"use strict";

// Charts. Bokeh reads the colours from CSS when it paints, so a change of the colour scheme needs one repaint.
const figures = JSON.parse(document.getElementById("figures").textContent);
const views = [];
for (const item of Object.values(figures)) {
  Bokeh.embed.embed_item(item).then((manager) => {
    views.push(...manager.roots.filter((view) => view.model.type === "Figure"));
  });
}
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const view of views) view.invalidate_layout();
});

// Examples: filter, sort, and show a page at a time.
const list = document.getElementById("example-list");
if (list) {
  const PAGE = 20;
  const cards = Array.from(list.children, (element) => ({
    element,
    words: element.textContent.toLowerCase(),
    ...element.dataset,
  }));
  const control = (name) => document.getElementById(name);
  const number = (text) => (text === "" ? NaN : Number(text));
  const ascending = (field) => (a, b) => {
    const x = number(a[field]), y = number(b[field]);
    if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);  // unscored ones last
    return x - y || a.rank - b.rank;
  };
  const descending = (field) => (a, b) => {
    const x = number(a[field]), y = number(b[field]);
    if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
    return y - x || a.rank - b.rank;
  };
  const orders = {
    ends: ascending("rank"),
    worst: ascending("margin"),
    best: descending("margin"),
    gained: descending("gain"),
    lost: ascending("gain"),
    place: ascending("place"),
  };
  let shown = PAGE;

  const update = () => {
    const words = control("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = { subset: control("subset").value, status: control("status").value };
    if (control("change")) wanted.change = control("change").value;
    const matching = cards.filter((card) =>
      words.every((word) => card.words.includes(word)) &&
      Object.entries(wanted).every(([field, value]) => value === "" || card[field] === value.slice(1)));
    matching.sort(orders[control("sort").value]);
    const visible = new Set(matching.slice(0, shown));
    for (const card of cards) card.element.hidden = !visible.has(card);
    for (const card of matching) list.append(card.element);
    control("count").textContent = `${visible.size} of ${matching.length} shown`;
    control("more").hidden = visible.size === matching.length;
  };
  for (const name of ["search", "subset", "status", "change", "sort"]) {
    control(name)?.addEventListener("input", () => { shown = PAGE; update(); });
  }
  control("more").addEventListener("click", () => { shown += PAGE; update(); });
  update();
}
