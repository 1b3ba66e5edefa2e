"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const [rows, columns] = data.grid;
const sizes = { patch: rows * columns, token: data.tokens.length };
const LISTED = 10;

// What is shown: the number of a relation, "mean" or a head, and the node that is kept or pointed at.
const shown = { relation: 0, head: "mean", joined: true, kept: null, pointed: null };

function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return new Uint16Array(bytes.buffer);
}

for (const relation of data.relations) {
  relation.sources = unpack(relation.sources);
  relation.targets = unpack(relation.targets);
  relation.steps = unpack(relation.weights);
  relation.cache = {};
  relation.heard = new Set(relation.targets).size;
}

// Weights of all edges in one head, or their mean over heads.
function weightsOf(relation, head) {
  if (relation.cache[head]) return relation.cache[head];
  const heads = head === "mean" ? [...Array(relation.heads).keys()] : [Number(head)];
  const weights = new Float32Array(relation.edges);
  for (const h of heads) {
    const scale = relation.largest[h] / 65535 / heads.length;
    const start = h * relation.edges;
    for (let e = 0; e < relation.edges; e++) weights[e] += relation.steps[start + e] * scale;
  }
  return (relation.cache[head] = weights);
}

// Tokens that are shown as one: the pieces of a word, or each on its own.
let units = [];
let unitOf = [];
function makeUnits() {
  units = [];
  unitOf = [];
  data.tokens.forEach((token, number) => {
    const last = units[units.length - 1];
    if (shown.joined && last && last.word === token.word) {
      last.tokens.push(number);
      last.span = [last.span[0], token.span[1]];
    } else {
      units.push({ tokens: [number], word: token.word, span: [...token.span] });
    }
    unitOf.push(units.length - 1);
  });
}

function nameOf(kind, number) {
  if (kind === "token") return "“" + data.text.slice(...units[number].span) + "”";
  return "patch " + Math.floor(number / columns) + "," + (number % columns);
}

// What glows: of the node chosen, or the mean over all that hear. Pieces of a word hear their mean and are heard
// as their sum.
function glow(chosen) {
  const relation = data.relations[shown.relation];
  const weights = weightsOf(relation, shown.head);
  const { sources, targets, source, target } = relation;
  const group = (kind, number) => (kind === "token" ? unitOf[number] : number);
  const kind = chosen && chosen.kind === target ? source : chosen ? target : source;
  const values = new Float64Array(kind === "token" ? units.length : sizes.patch);
  if (chosen && chosen.kind !== source && chosen.kind !== target) return { kind, values, way: "none" };
  const pieces = (kind, number) => (kind === "token" ? units[number].tokens.length : 1);
  if (!chosen) {
    for (let e = 0; e < weights.length; e++) values[group(source, sources[e])] += weights[e] / relation.heard;
    return { kind, values, way: "all" };
  }
  const hears = chosen.kind === target;
  for (let e = 0; e < weights.length; e++) {
    const here = hears ? targets[e] : sources[e];
    if (group(chosen.kind, here) !== chosen.number) continue;
    const there = group(kind, hears ? sources[e] : targets[e]);
    values[there] += weights[e] / (hears ? pieces(chosen.kind, chosen.number) : pieces(kind, there));
  }
  return { kind, values, way: hears ? "hears" : "heard" };
}

// The strongest edges of the relation when nothing is chosen, else of the node that is.
function listed(chosen, found) {
  const relation = data.relations[shown.relation];
  let list = [];
  if (chosen) {
    list = Array.from(found.values, (weight, number) => ({
      to: found.way === "hears" ? nameOf(chosen.kind, chosen.number) : nameOf(found.kind, number),
      from: found.way === "hears" ? nameOf(found.kind, number) : nameOf(chosen.kind, chosen.number),
      weight,
    }));
  } else {
    const weights = weightsOf(relation, shown.head);
    const group = (kind, number) => nameOf(kind, kind === "token" ? unitOf[number] : number);
    const order = Array.from(weights.keys()).sort((a, b) => weights[b] - weights[a]).slice(0, LISTED);
    list = order.map((e) => ({
      to: group(relation.target, relation.targets[e]),
      from: group(relation.source, relation.sources[e]),
      weight: weights[e],
    }));
  }
  return list.filter((edge) => edge.weight > 0).sort((a, b) => b.weight - a.weight).slice(0, LISTED);
}

const cells = [];
function svg(name, attributes, parent) {
  const element = document.createElementNS(byId("picture").namespaceURI, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  parent.appendChild(element);
  return element;
}

function drawPicture() {
  const [left, top, right, bottom] = data.view;
  const { width, height, address } = data.picture;
  const box = [Math.min(0, left), Math.min(0, top), Math.max(width, right), Math.max(height, bottom)];
  const picture = byId("picture");
  const size = [box[2] - box[0], box[3] - box[1]];
  picture.setAttribute("viewBox", [box[0], box[1], ...size].join(" "));
  picture.style.setProperty("--ratio", size[0] / size[1]);
  svg("image", { href: address, x: 0, y: 0, width, height, preserveAspectRatio: "none" }, picture);
  const outside = `M${box[0]} ${box[1]}H${box[2]}V${box[3]}H${box[0]}Z M${left} ${top}V${bottom}H${right}V${top}Z`;
  svg("path", { id: "outside", d: outside }, picture);
  const group = svg("g", { id: "cells" }, picture);
  const wide = (right - left) / columns;
  const high = (bottom - top) / rows;
  for (let n = 0; n < sizes.patch; n++) {
    const x = left + (n % columns) * wide;
    const y = top + Math.floor(n / columns) * high;
    cells.push(svg("rect", { x, y, width: wide, height: high, "data-number": n }, group));
  }
  svg("g", { id: "marks" }, picture);
}

function mark(number, name) {
  const marks = byId("marks");
  const { x, y, width, height } = cells[number].attributes;
  const at = { x: x.value, y: y.value, width: width.value, height: height.value };
  svg("rect", { ...at, class: "halo" }, marks);
  svg("rect", { ...at, class: name }, marks);
}

function drawCaption() {
  makeUnits();
  const caption = byId("caption");
  caption.textContent = "";
  let end = 0;
  units.forEach((unit, number) => {
    caption.append(data.text.slice(end, unit.span[0]));
    unit.element = document.createElement("span");
    unit.element.className = "unit";
    unit.element.dataset.number = number;
    unit.element.textContent = data.text.slice(...unit.span);
    caption.append(unit.element);
    end = unit.span[1];
  });
  caption.append(data.text.slice(end));
}

const round = (value) => (value >= 0.1 || value === 0 ? value.toFixed(3) : value >= 0.0001 ? value.toPrecision(2) : value.toExponential(1));

function tell(chosen, found, relation) {
  const head = shown.head === "mean" ? "mean of heads" : "head " + shown.head;
  const where = relation.name + ", layer " + relation.layer + ", " + head;
  if (!chosen) return "All that hear (" + where + "): the mean of what they attend to.";
  const name = nameOf(chosen.kind, chosen.number);
  if (found.way === "none") {
    return name + ": " + relation.name + " joins " + relation.source + " and " + relation.target + " nodes only.";
  }
  return name + (found.way === "hears" ? " attends to these" : " is attended to by these") + " (" + where + ").";
}

function render() {
  const chosen = shown.pointed || shown.kept;
  const relation = data.relations[shown.relation];
  const found = glow(chosen);
  const largest = found.values.reduce((a, b) => Math.max(a, b), 0);
  const best = largest > 0 ? found.values.indexOf(largest) : -1;
  const patches = found.kind === "patch";
  // What every node has alike glows nowhere: opacity is the lead over the least, as a share of the largest.
  const least = found.values.reduce((a, b) => Math.min(a, b), largest);
  const opacity = (value) => (largest > 0 ? (0.85 * (value - least)) / largest : 0);
  byId("picture").classList.toggle("hot", patches && largest > 0);
  cells.forEach((cell, n) => {
    cell.style.fillOpacity = patches ? opacity(found.values[n]) : 0;
  });
  byId("marks").textContent = "";
  if (patches && best >= 0) mark(best, "best");
  if (chosen && chosen.kind === "patch") mark(chosen.number, "chosen");
  units.forEach((unit, n) => {
    const value = patches || !(largest > 0) ? null : found.values[n];
    const alpha = value === null ? 0 : opacity(value);
    unit.element.style.backgroundImage = `linear-gradient(rgba(230,159,0,${alpha}), rgba(230,159,0,${alpha}))`;
    unit.element.dataset.value = value === null ? "" : round(value);
    unit.element.classList.toggle("best", !patches && n === best);
    unit.element.classList.toggle("chosen", Boolean(chosen) && chosen.kind === "token" && chosen.number === n);
  });
  byId("status").textContent = tell(chosen, found, relation);
  byId("edges-title").textContent = "Strongest edges";
  const body = document.querySelector("#edges tbody");
  body.textContent = "";
  const edges = listed(chosen, found);
  for (const edge of edges) {
    const row = body.insertRow();
    for (const text of [edge.to, edge.from]) row.insertCell().textContent = text;
    const number = row.insertCell();
    number.className = "number";
    number.textContent = round(edge.weight);
    const bar = document.createElement("span");
    bar.className = "bar";
    bar.style.width = (100 * edge.weight) / edges[0].weight + "%";
    row.insertCell().append(bar);
  }
  document.body.dataset.chosen = chosen ? chosen.kind + " " + chosen.number : "";
  document.body.dataset.best = best < 0 ? "" : found.kind + " " + best;
}

// Drawn at most once a frame, however fast the pointer moves.
let waiting = false;
function later() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    render();
  });
}

function remember() {
  const relation = data.relations[shown.relation];
  const parts = ["relation=" + relation.name + "." + relation.layer, "head=" + shown.head];
  if (!shown.joined) parts.push("pieces");
  if (shown.kept) parts.push(shown.kept.kind + "=" + shown.kept.number);
  try {
    history.replaceState(null, "", "#" + parts.join("&"));
  } catch (error) {
    // A page inside a sandboxed frame has no history, and needs none.
  }
}

function keep(node) {
  shown.kept = node;
  shown.pointed = null;
  render();
  remember();
}

function fillHeads() {
  const head = byId("head");
  head.textContent = "";
  head.append(new Option("mean", "mean"));
  for (let h = 0; h < data.relations[shown.relation].heads; h++) head.append(new Option(String(h), String(h)));
  head.value = shown.head;
}

function nodeAt(target, kind) {
  const element = target.closest("[data-number]");
  return element ? { kind, number: Number(element.dataset.number) } : null;
}

function listen(id, kind, step) {
  const area = byId(id);
  area.addEventListener("pointermove", (event) => {
    if (event.pointerType === "touch") return;
    shown.pointed = nodeAt(event.target, kind);
    later();
  });
  area.addEventListener("pointerleave", () => {
    shown.pointed = null;
    later();
  });
  area.addEventListener("click", (event) => {
    const node = nodeAt(event.target, kind);
    const same = node && shown.kept && shown.kept.kind === kind && shown.kept.number === node.number;
    keep(same ? null : node);
  });
  area.addEventListener("keydown", (event) => {
    const last = (kind === "patch" ? sizes.patch : units.length) - 1;
    const now = shown.kept && shown.kept.kind === kind ? shown.kept.number : null;
    const next = step(event.key, now, last);
    if (next === null) return;
    event.preventDefault();
    keep({ kind, number: next });
  });
}

function stepPatch(key, now, last) {
  const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  if (key === "Home") return 0;
  if (key === "End") return last;
  if (!(key in moves)) return null;
  if (now === null) return 0;
  const row = Math.floor(now / columns) + moves[key][0];
  const column = (now % columns) + moves[key][1];
  return row < 0 || row >= rows || column < 0 || column >= columns ? now : row * columns + column;
}

function stepUnit(key, now, last) {
  if (key === "Home") return 0;
  if (key === "End") return last;
  const back = key === "ArrowLeft" || key === "ArrowUp";
  if (!back && key !== "ArrowRight" && key !== "ArrowDown") return null;
  if (now === null) return 0;
  return Math.min(last, Math.max(0, now + (back ? -1 : 1)));
}

// The first view: what the address names, else the last relation from patches to tokens.
function recall() {
  const names = data.relations.map((relation) => relation.name + "." + relation.layer);
  let first = 0;
  data.relations.forEach((relation, number) => {
    if (relation.source === "patch" && relation.target === "token") first = number;
  });
  const given = new URLSearchParams(location.hash.slice(1));
  shown.relation = names.includes(given.get("relation")) ? names.indexOf(given.get("relation")) : first;
  const head = given.get("head");
  shown.head = head !== null && Number(head) < data.relations[shown.relation].heads && /^\d+$/.test(head) ? head : "mean";
  shown.joined = !given.has("pieces");
  drawCaption();
  const limits = { patch: sizes.patch, token: units.length };
  for (const kind of ["patch", "token"]) {
    const number = given.get(kind);
    if (number !== null && /^\d+$/.test(number) && Number(number) < limits[kind]) {
      shown.kept = { kind, number: Number(number) };
    }
  }
}

function begin() {
  if (!data.relations.length) {
    byId("status").textContent = "This model has no relation, so there is no attention to show.";
    return;
  }
  data.relations.forEach((relation, number) => {
    const label = `${relation.name}, layer ${relation.layer} (${relation.source} → ${relation.target})`;
    byId("relation").append(new Option(label, String(number)));
  });
  drawPicture();
  recall();
  fillHeads();
  byId("relation").value = String(shown.relation);
  byId("joined").checked = shown.joined;
  listen("picture", "patch", stepPatch);
  listen("caption", "token", stepUnit);
  byId("relation").addEventListener("change", (event) => {
    shown.relation = Number(event.target.value);
    if (shown.head !== "mean" && Number(shown.head) >= data.relations[shown.relation].heads) shown.head = "mean";
    fillHeads();
    render();
    remember();
  });
  byId("head").addEventListener("change", (event) => {
    shown.head = event.target.value;
    render();
    remember();
  });
  byId("joined").addEventListener("change", (event) => {
    shown.joined = event.target.checked;
    if (shown.kept && shown.kept.kind === "token") shown.kept = null;
    drawCaption();
    render();
    remember();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") keep(null);
  });
  render();
  document.body.dataset.ready = "true";
}

begin();
