"use strict";
/* Elements: small functions that make parts of the page. Texts are set as text, never as HTML. */

dyvte.make = function (tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) {
      element.addEventListener(name.slice(2), value);
    } else if (value === true) {
      element.setAttribute(name, "");
    } else if (value !== false && value !== null && value !== undefined) {
      element.setAttribute(name, value);
    }
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
};

dyvte.svg = function (tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) {
    element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
};

/* One cell for each layer: updated, read, or gone. */
dyvte.depthBar = function (report) {
  const bar = dyvte.make("div", {
    class: "depth",
    role: "img",
    "aria-label": dyvte.depthText(report.freeze_layer, report.exit_layer, report.num_layers),
  });
  for (let layer = 1; layer <= report.num_layers && report.exit_layer >= 0; layer++) {
    const state = layer <= report.freeze_layer ? "updated" : layer <= report.exit_layer ? "read" : "gone";
    bar.append(dyvte.make("span", { class: state, title: `layer ${layer}: ${state}` }));
  }
  return bar;
};

/* The answer for every layer after which the image could have left. */
dyvte.strip = function (traced, chosen, choose) {
  const list = dyvte.make("ol", { class: "strip", start: 0, "aria-label": "Answers by exit layer" });
  traced.schedules.slice(0, traced.num_layers + 1).forEach((one, k) => {
    const note = `If the image had left after layer ${k}: ${one.answer || "(nothing)"}${one.is_full ? ", as the full model" : ""}`;
    const button = dyvte.make(
      "button",
      {
        type: "button",
        class: one.is_full ? "same" : "other",
        "aria-label": note,
        title: `${note}. KL to the full model ${one.risk.toFixed(3)} nats`,
        "aria-pressed": k === chosen ? "true" : "false",
        "data-layer": k,
        onclick: () => choose(one),
        onkeydown: (event) => dyvte.stepKeys(event, list),
      },
      dyvte.make("span", { class: "layer", "aria-hidden": "true" }, String(k)),
      dyvte.make("span", { class: "answer" }, one.answer || "\u2205"),
    );
    list.append(dyvte.make("li", { class: k === traced.first_stable ? "stable" : null }, button));
  });
  return list;
};

/* Arrow keys, Home and End go along a list of buttons. */
dyvte.stepKeys = function (event, list) {
  const buttons = [...list.querySelectorAll("button")];
  const at = buttons.indexOf(event.currentTarget);
  const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: buttons.length - 1 }[event.key];
  if (to !== undefined && buttons[to]) {
    event.preventDefault();
    buttons[to].focus();
    buttons[to].click();
  }
};

/* What the gates say as bars, on the scale of levels, and a threshold that can be dragged across them.
   marks: {exits: (L-1) levels, freezes: (L) levels or none, exit, freeze, level, gap}.
   An image may freeze before the first layer: then there is a column 0. */
dyvte.gateChart = function (marks, change) {
  const { exits, exit, freeze, level, gap } = marks;
  const freezes = marks.freezes.map((value, j) => [j, value]).filter(([, value]) => dyvte.isPossible(value));
  const first = freezes.length > 0 ? 0 : 1;
  const columns = exits.length + 1 - first;
  const range = dyvte.chartRange(marks);
  const [width, height, left, top, tall] = [Math.max(320, 30 * columns + 90), 170, 72, 8, 136];
  const step = (width - left - 8) / Math.max(1, columns);
  const clip = (value) => Math.max(range.low, Math.min(range.high, value));
  const y = (value) => top + ((range.high - clip(value)) / (range.high - range.low)) * tall;
  const x = (layer) => left + (layer - first + 0.5) * step;
  const axis = (layer) =>
    dyvte.svg("text", { class: "axis", x: x(layer), y: height - 12, "text-anchor": "middle" }, String(layer));
  const said = exits.map((value, i) => `${i + 1}: ${dyvte.thresholdText(value)}`).join(", ");
  const frozen = freezes.map(([j, value]) => `${j}: ${dyvte.thresholdText(value - gap)}`).join(", ");
  const chart = dyvte.svg("svg", {
    class: "gates",
    viewBox: `0 0 ${width} ${height}`,
    role: "img",
    "aria-label": `Each gate's chance that the image leaves after its layer. ${said}. ${
      frozen && `That it freezes, on the same scale: ${frozen}. `
    }Threshold ${dyvte.thresholdText(level)}`,
  });
  for (const mark of range.ticks) {
    chart.append(
      dyvte.svg("line", { class: "grid", x1: left, x2: width - 4, y1: y(mark), y2: y(mark) }),
      dyvte.svg("text", { class: "axis", x: left - 5, y: y(mark) + 4, "text-anchor": "end" }, dyvte.thresholdText(mark)),
    );
  }
  exits.forEach((value, i) => {
    const k = i + 1;
    const kind = k === exit ? "fires" : k > exit ? "later" : "stays";
    chart.append(
      dyvte.svg("rect", {
        class: kind,
        x: x(k) - step * 0.35,
        width: step * 0.7,
        y: y(value),
        height: Math.max(1.5, top + tall - y(value)),
      }),
      axis(k),
    );
  });
  if (first === 0) {
    chart.append(axis(0));
  }
  freezes.forEach(([j, value]) => {
    const kind = j === freeze && freeze < exit ? "freeze now" : "freeze";
    chart.append(dyvte.svg("circle", { class: kind, cx: x(j), cy: y(value - gap), r: 4 }));
  });
  chart.append(
    dyvte.svg("line", { class: "cut", x1: left, x2: width - 4, y1: y(level), y2: y(level) }),
    dyvte.svg("circle", { class: "grip", cx: width - 10, cy: y(level), r: 7 }),
  );
  chart.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    // Each change draws a new chart in the same place: where it lies does not change while dragging.
    const box = chart.getBoundingClientRect();
    const follow = (moved) => {
      const at = ((moved.clientY - box.top) / box.height) * height;
      const share = Math.min(1, Math.max(0, (at - top) / tall));
      change(range.high - share * (range.high - range.low));
    };
    const end = () => {
      window.removeEventListener("pointermove", follow);
      window.removeEventListener("pointerup", end);
      window.removeEventListener("pointercancel", end);
    };
    window.addEventListener("pointermove", follow);
    window.addEventListener("pointerup", end);
    window.addEventListener("pointercancel", end);
    follow(event);
  });
  return chart;
};

/* A freeze head that was never trained for a layer says so by an offset of about -1e30. */
dyvte.isPossible = (value) => value > -1e20;

/* Levels that a chart and a slider show: all of the gates', and even chances. */
dyvte.chartRange = function ({ exits, freezes, gap }) {
  const all = [...exits, ...freezes.map((value) => value - gap), -3, 3].filter((value) => Math.abs(value) < 30);
  const low = Math.floor(Math.min(...all)) - 1;
  const high = Math.ceil(Math.max(...all)) + 1;
  const ticks = [-20, -14, -9, -4.595, 0, 4.595, 9, 14, 20].filter((value) => value > low && value < high);
  return { low, high, ticks };
};
