"use strict";
const byId = (id) => document.getElementById(id);
const setup = JSON.parse(byId("setup").textContent);
const pairs = [...document.querySelectorAll(".pair")];
const REGISTRATION_VIEWS = [
  { short: "After", name: "case, labels after registration", image: 0, contours: 0, other: 1 },
  { short: "Before", name: "case, labels before the deformation (affine alone)", image: 0, contours: 1, other: 0 },
  { short: "Warped atlas", name: "atlas and labels after registration", image: 1, contours: 0, other: 0 },
  { short: "Affine atlas", name: "atlas and labels before the deformation", image: 2, contours: 1, other: 2 },
];
const PREDICTION_VIEWS = [
  { short: "Prediction", name: "prediction", image: 0, contours: 0, other: 1 },
  { short: "Reference", name: "reference, read for scoring only", image: 0, contours: 1, other: 0 },
  { short: "Uncertainty", name: "uncertainty, dark where certain, with the prediction", image: 1, contours: 0, other: 0 },
];

/* Ratings: kept in the browser, newer ones of the dataset's file first. */
const store = `nnunet_oneshot ratings ${setup.ratings.dataset} ${setup.ratings.registrations}`;
let kept = {};
try {
  kept = JSON.parse(localStorage.getItem(store)) || {};
} catch (error) {
  kept = {};
}
const placeOf = (pair) => JSON.stringify([pair.dataset.atlas, pair.dataset.case]);
for (const pair of pairs) {
  const own = kept[placeOf(pair)];
  if (own && own.key === pair.dataset.key && own.base === pair.dataset.kept) show(pair, own.rating);
}
function show(pair, rating) {
  pair.dataset.rating = rating;
  pair.querySelector(".rated").textContent = rating === "none" ? "" : rating;
}
function rate(pair, value) {
  const rating = pair.dataset.rating === value ? "none" : value;
  show(pair, rating);
  kept[placeOf(pair)] = { rating, key: pair.dataset.key, base: pair.dataset.kept };
  let text = "";
  try {
    localStorage.setItem(store, JSON.stringify(kept));
  } catch (error) {
    text = " This browser keeps nothing for this page: export before you close it.";
  }
  tell(text);
  markRating(pair);
}
function tell(text) {
  const counts = setup.ratings.values.map((v) => `${pairs.filter((p) => p.dataset.rating === v).length} ${v}`);
  byId("rated").textContent = `${counts.join(", ")}.${text}`;
}
function ratingsFile() {
  const rated = pairs.filter((p) => p.dataset.rating !== "none" || p.dataset.kept !== "none");
  const ratings = rated.map((p) => ({
    registrations: setup.ratings.registrations,
    atlas: p.dataset.atlas,
    case: p.dataset.case,
    rating: p.dataset.rating,
    key: p.dataset.key,
  }));
  return JSON.stringify({ format: setup.ratings.format, version: 1, dataset: setup.ratings.dataset, ratings }, null, 4);
}
byId("export").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([ratingsFile()], { type: "application/json" }));
  link.download = setup.ratings.file;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  tell(" Exported.");
});

/* Filter and order. */
const list = byId("pairs");
function filter() {
  const name = byId("f-name").value.trim().toLowerCase();
  const score = parseFloat(byId("f-score").value);
  const [flag, rating, part] = ["f-flag", "f-rating", "f-part"].map((id) => byId(id).value);
  let count = 0;
  for (const pair of pairs) {
    const data = pair.dataset;
    const flags = data.flags ? data.flags.split(" ") : [];
    const fits =
      (!name || `${data.case} ${data.atlas}`.toLowerCase().includes(name)) &&
      !(parseFloat(data.score) > score) &&
      (!flag || (flag === "*" ? flags.length > 0 : flag === "-" ? !flags.length : flags.includes(flag))) &&
      (!rating || data.rating === rating) &&
      (!part || data.part === part);
    pair.hidden = !fits;
    count += fits;
  }
  byId("count").textContent = `${count} of ${pairs.length} registrations`;
}
function sort() {
  const by = byId("f-order").value;
  const ordered = [...pairs].sort((a, b) => {
    if (by === "name") return a.dataset.case.localeCompare(b.dataset.case, undefined, { numeric: true });
    return (by === "best" ? -1 : 1) * (a.dataset.score - b.dataset.score);
  });
  list.append(...ordered);
}
byId("filter").addEventListener("input", () => { sort(); filter(); });
byId("filter").addEventListener("reset", () => setTimeout(() => { sort(); filter(); }));
byId("filter").addEventListener("submit", (event) => event.preventDefault());

/* The viewer. */
const viewer = byId("viewer");
let opened = null, views = [], chosen = 0, flipped = false, alone = null, pair = null, opener = null;
/* A pointer that happens to lie where the cuts appear changes nothing until then. */
let quiet = 0;
function open(id, title) {
  const content = byId(`cuts-${id}`);
  pair = pairs.find((p) => p.id === id) || null;
  opened = content ? JSON.parse(content.textContent) : null;
  views = opened ? (pair ? REGISTRATION_VIEWS : PREDICTION_VIEWS).filter((v) => v.image < opened.images.length) : [];
  quiet = Date.now() + 400;
  chosen = Math.min(chosen, Math.max(0, views.length - 1));
  flipped = false;
  byId("v-title").textContent = title;
  const group = byId("v-views");
  group.replaceChildren(...views.map((view, number) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = `${view.short} (${number + 1})`;
    button.addEventListener("click", () => choose(number));
    return button;
  }));
  for (const name of ["v-previous", "v-next", "v-rating"]) byId(name).hidden = !pair;
  byId("v-figures").textContent = pair ? figures(pair.dataset) : "";
  if (pair) markRating(pair);
  draw();
  if (!viewer.open) {
    opener = document.activeElement;
    viewer.showModal();
  }
  viewer.scrollTop = 0;
  byId("v-title").focus();
}
function figures(data) {
  return `Similarity around the labels ${(+data.score).toFixed(3)}; of the whole image ${data.before} after the affine ` +
    `stage, ${data.after} after the deformable one. Mean displacement ${data.moved} mm, folding ${data.folding} %. ` +
    `${data.part === "training" ? "A training case" : "A validation case"} of atlas ${data.atlas}.`;
}
function markRating(current) {
  for (const button of byId("v-rating").querySelectorAll("button"))
    button.setAttribute("aria-pressed", String(button.dataset.value === current.dataset.rating));
}
function node(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) if (value !== "") made.setAttribute(key, value);
  made.append(...children);
  return made;
}
function draw() {
  [...byId("v-views").children].forEach((b, number) => b.setAttribute("aria-pressed", String(number === chosen)));
  if (!opened) {
    byId("v-cuts").replaceChildren("There are no cuts of this one on the page.");
    byId("v-now").textContent = "";
    return;
  }
  const view = flipped ? views[views[chosen].other] : views[chosen];
  byId("v-now").textContent = `Shown: ${view.name}.`;
  byId("v-cuts").replaceChildren(...opened.cuts.map((cut, number) => {
    const [w, h] = [cut.w * opened.scale, cut.h * opened.scale];
    const picture = node("svg", { viewBox: `0 0 ${w} ${h}`, role: "img", "aria-label": `${cut.name}: ${view.name}` },
      node("image", { href: opened.images[view.image].src[number], width: w, height: h }));
    for (const label of setup.labels) {
      const d = opened.contours[view.contours].paths[number][label.value];
      if (!d) continue;
      const title = node("title", {}, label.name);
      const dim = alone !== null && alone !== label.value ? " dim" : "";
      picture.append(node("path", { d, class: `halo${dim}` }),
        node("path", { d, class: `line${dim}`, stroke: label.colour, "stroke-dasharray": label.dash }, title));
    }
    const figure = document.createElement("figure"), caption = document.createElement("figcaption");
    caption.textContent = cut.name;
    figure.append(picture, caption);
    return figure;
  }));
}
function choose(number) {
  chosen = number;
  flipped = false;
  quiet = Date.now() + 400;
  draw();
}
function flip(on) {
  if (opened && flipped !== on) { flipped = on; draw(); }
}
function go(step) {
  const shown = [...list.children].filter((p) => !p.hidden);
  const next = shown[shown.indexOf(pair) + step];
  if (next) openPair(next);
}
function openPair(next) {
  open(next.id, next.dataset.case);
}
for (const one of pairs) one.querySelector("button").addEventListener("click", () => openPair(one));
for (const button of document.querySelectorAll(".open"))
  button.addEventListener("click", () => open(button.dataset.cuts, button.dataset.title));
byId("v-previous").addEventListener("click", () => go(-1));
byId("v-next").addEventListener("click", () => go(1));
byId("v-close").addEventListener("click", () => viewer.close());
viewer.addEventListener("close", () => {
  const target = pair ? pair.querySelector("button") : opener;
  filter();
  if (target) target.focus();
});
const cuts = byId("v-cuts");
cuts.addEventListener("pointermove", (event) => { if (event.pointerType === "mouse" && Date.now() > quiet) flip(true); });
cuts.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") flip(false); });
cuts.addEventListener("pointerup", (event) => { if (event.pointerType !== "mouse") flip(!flipped); });
for (const button of byId("v-legend").querySelectorAll("button"))
  button.addEventListener("click", () => {
    const value = Number(button.dataset.label);
    alone = alone === value ? null : value;
    for (const b of byId("v-legend").querySelectorAll("button"))
      b.setAttribute("aria-pressed", String(Number(b.dataset.label) === alone));
    draw();
  });
for (const button of byId("v-rating").querySelectorAll("button"))
  button.addEventListener("click", () => rate(pair, button.dataset.value));
viewer.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key.toLowerCase();
  const value = setup.ratings.values.find((v) => v[0] === key);
  if (pair && key === "arrowright") go(1);
  else if (pair && key === "arrowleft") go(-1);
  else if (key === " " && event.target.tagName !== "BUTTON") flip(!flipped);
  else if (/^[1-9]$/.test(key) && views[key - 1]) choose(key - 1);
  else if (pair && value) rate(pair, value);
  else return;
  event.preventDefault();
});
tell("");
