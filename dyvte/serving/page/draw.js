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
  const full = traced.answers[traced.num_layers];
  const list = dyvte.make("ol", { class: "strip", start: 0, "aria-label": "Answers by exit layer" });
  traced.answers.forEach((answer, k) => {
    const same = answer === full;
    const note = `If the image had left after layer ${k}: ${answer || "(nothing)"}${same ? ", as the full model" : ""}`;
    const button = dyvte.make(
      "button",
      {
        type: "button",
        class: same ? "same" : "other",
        "aria-label": note,
        title: `${note}. KL to the full model ${traced.risks[k].toFixed(3)} nats`,
        "aria-pressed": k === chosen ? "true" : "false",
        "data-layer": k,
        onclick: () => choose(k),
        onkeydown: (event) => dyvte.stepKeys(event, list),
      },
      dyvte.make("span", { class: "layer", "aria-hidden": "true" }, String(k)),
      dyvte.make("span", { class: "answer" }, answer || "∅"),
    );
    const item = dyvte.make("li", { class: k === traced.first_stable ? "stable" : null }, button);
    list.append(item);
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

/* Chances of the gates as bars, and a threshold that can be dragged across them. */
dyvte.gateChart = function (chances, exit, threshold, change) {
  const width = Math.max(240, 26 * chances.length + 40);
  const height = 130;
  const left = 34;
  const top = 8;
  const tall = 96;
  const step = (width - left - 6) / Math.max(1, chances.length);
  const y = (chance) => top + (1 - chance) * tall;
  const chart = dyvte.svg("svg", {
    class: "gates",
    viewBox: `0 0 ${width} ${height}`,
    role: "img",
    "aria-label":
      "Each gate's chance that the image leaves after its layer: " +
      chances.map((chance, i) => `${i + 1}: ${chance === null ? "none" : chance.toFixed(2)}`).join(", "),
  });
  for (const mark of [0, 0.5, 1]) {
    chart.append(
      dyvte.svg("line", { class: "grid", x1: left, x2: width - 4, y1: y(mark), y2: y(mark) }),
      dyvte.svg("text", { class: "axis", x: left - 5, y: y(mark) + 4, "text-anchor": "end" }, String(mark)),
    );
  }
  chances.forEach((chance, i) => {
    const k = i + 1;
    const value = chance === null ? 0 : chance;
    const kind = k === exit ? "fires" : k > exit ? "later" : "stays";
    chart.append(
      dyvte.svg("rect", {
        class: kind,
        x: left + i * step + step * 0.15,
        width: step * 0.7,
        y: y(value),
        height: Math.max(1, value * tall),
      }),
      dyvte.svg("text", { class: "axis", x: left + (i + 0.5) * step, y: height - 10, "text-anchor": "middle" }, String(k)),
    );
  });
  const line = dyvte.svg("line", { class: "cut", x1: left, x2: width - 4, y1: y(threshold), y2: y(threshold) });
  const grip = dyvte.svg("circle", { class: "grip", cx: width - 10, cy: y(threshold), r: 6 });
  chart.append(line, grip);
  const follow = (event) => {
    const box = chart.getBoundingClientRect();
    const at = ((event.clientY - box.top) / box.height) * height;
    change(Math.min(1, Math.max(0, 1 - (at - top) / tall)));
  };
  chart.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    follow(event);
    const move = (moved) => follow(moved);
    const end = () => {
      window.removeEventListener("pointermove", move);
      window.removeEventListener("pointerup", end);
      window.removeEventListener("pointercancel", end);
    };
    window.addEventListener("pointermove", move);
    window.addEventListener("pointerup", end);
    window.addEventListener("pointercancel", end);
  });
  return chart;
};
