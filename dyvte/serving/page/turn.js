"use strict";
/* One question with its answers: three columns, and what every exit would have answered. */

dyvte.COLUMNS = ["full", "fixed", "own"];

/* A turn's record; everything on the page, and in a saved page, is drawn from it. */
dyvte.newTurn = function (question, images, schedules) {
  const columns = {};
  for (const name of dyvte.COLUMNS) {
    columns[name] = { schedule: schedules[name], text: "", report: null, firstToken: null, state: "waiting" };
  }
  return { question, images, columns, traced: null, tracing: "waiting", threshold: null, layer: null, error: null };
};

dyvte.TurnView = class {
  /* settings: what the server says of its schedules; onThreshold: for gates that only the server can follow. */
  constructor(turn, settings, onThreshold) {
    this.turn = turn;
    this.settings = settings;
    this.onThreshold = onThreshold;
    this.element = dyvte.make("article", { class: "turn" });
    this.draw();
  }

  draw() {
    const turn = this.turn;
    const shown = turn.images.map((url, at) =>
      dyvte.make("img", { src: url, alt: `Image ${at + 1} of the question "${turn.question}"` }),
    );
    this.columns = dyvte.make("div", { class: "columns" });
    this.exits = dyvte.make("section", { class: "exits", "aria-label": "Every exit layer" });
    this.element.replaceChildren(
      dyvte.make("h2", {}, turn.question),
      dyvte.make("div", { class: "shown" }, ...shown),
      turn.error === null ? "" : dyvte.make("p", { class: "error", role: "alert" }, turn.error),
      this.columns,
      this.exits,
    );
    this.drawColumns();
    this.drawExits();
  }

  drawColumns() {
    const titles = { full: "Full model", fixed: "Fixed schedule", own: this.settings.gates ? "Gates" : "This server's" };
    this.columns.replaceChildren(
      ...dyvte.COLUMNS.map((name) => {
        const column = this.turn.columns[name];
        const report = column.report;
        const card = dyvte.make(
          "section",
          { class: `card ${name}`, "aria-label": titles[name], "data-state": column.state },
          dyvte.make("h3", {}, titles[name], " ", dyvte.make("small", {}, column.schedule)),
          dyvte.make("p", { class: "text", "aria-live": "polite" }, column.text || (column.state === "done" ? "(nothing)" : "…")),
        );
        if (report !== null) {
          card.append(dyvte.depthBar(report), this.facts(column));
        }
        return card;
      }),
    );
  }

  facts(column) {
    const report = column.report;
    const list = dyvte.make("dl");
    const add = (name, value) => list.append(dyvte.make("div", {}, dyvte.make("dt", {}, name), dyvte.make("dd", {}, value)));
    add("first token", column.firstToken === null ? "from the trace" : `${column.firstToken.toFixed(0)} ms`);
    add("KV", dyvte.bytes(report.kv_bytes));
    if (report.exit_layer >= 0) {
      const frozen = report.freeze_layer < report.exit_layer ? `, frozen after ${report.freeze_layer}` : "";
      const never = report.exit_layer === report.num_layers;
      add("image", never ? `never left${frozen}` : `left after layer ${report.exit_layer} of ${report.num_layers}${frozen}`);
      add("visual compute", dyvte.percent(report.visual_compute));
    }
    const bound = this.boundOf(column);
    if (bound) {
      add("certified", dyvte.boundText(bound));
    }
    return list;
  }

  /* The certificate of what a column shows. */
  boundOf(column) {
    if (column !== this.turn.columns.own || !this.settings.gates || column.report.exit_layer < 0) {
      return null;
    }
    return this.settings.gates.certificates.find((one) => one.threshold === this.turn.threshold) || null;
  }

  drawExits() {
    const { turn, settings } = this;
    const traced = turn.traced;
    if (traced === null) {
      const text = { waiting: "", busy: "Looking at every exit layer …", failed: "" }[turn.tracing] || "";
      this.exits.replaceChildren(text ? dyvte.make("p", { class: "quiet" }, text) : "");
      return;
    }
    const focused = this.exits.contains(document.activeElement) ? document.activeElement.dataset : {};
    const L = traced.num_layers;
    const parts = [dyvte.make("h3", {}, "The answer if the image had left after layer …")];
    parts.push(dyvte.strip(traced, turn.layer, (k) => this.chooseLayer(k)));
    const stable = traced.first_stable;
    parts.push(
      dyvte.make(
        "p",
        { class: "quiet" },
        stable === L ? "Only the full model gives its answer." : `From layer ${stable} on, every exit gives the full model's answer.`,
        ` One trace, and ${traced.generated} ${traced.generated === 1 ? "answer" : "answers"} generated beside it.`,
      ),
    );
    if (settings.gates && turn.threshold !== null) {
      parts.push(...this.gateParts(traced));
    }
    this.exits.replaceChildren(...parts);
    const again = focused.layer !== undefined ? `[data-layer="${focused.layer}"]` : focused.control ? `[data-control="${focused.control}"]` : null;
    if (again) {
      this.exits.querySelector(again)?.focus();
    }
  }

  gateParts(traced) {
    const { turn, settings } = this;
    const parts = [dyvte.make("h3", {}, "Each gate's chance, and the threshold")];
    const exit = turn.columns.own.report === null ? traced.num_layers : turn.columns.own.report.exit_layer;
    const set = (value) => this.setThreshold(value);
    if (traced.gate_probabilities !== null) {
      parts.push(dyvte.gateChart(traced.gate_probabilities, exit, turn.threshold, set));
    }
    const slider = dyvte.make("input", {
      type: "range",
      min: 0,
      max: 1,
      step: 0.005,
      "data-control": "threshold",
      oninput: (event) => set(Number(event.target.value)),
    });
    slider.value = String(turn.threshold);
    parts.push(
      dyvte.make("label", { class: "slider" }, "Threshold ", slider, dyvte.make("output", {}, turn.threshold.toFixed(3))),
    );
    if (settings.gates.certificates.length > 0) {
      parts.push(this.dial());
    }
    return parts;
  }

  /* Bounds that calibration proved, from the strictest on; before them: never leave. */
  dial() {
    const bounds = [null, ...this.settings.gates.certificates];
    const at = bounds.findIndex((one) => (one === null ? 1 : one.threshold) === this.turn.threshold);
    const dial = dyvte.make("input", {
      type: "range",
      min: 0,
      max: bounds.length - 1,
      step: 1,
      "data-control": "risk",
      "aria-valuetext": at < 0 ? "nothing is certified at this threshold" : dyvte.boundText(bounds[at]),
      oninput: (event) => {
        const one = bounds[Number(event.target.value)];
        this.setThreshold(one === null ? 1 : one.threshold);
      },
    });
    dial.value = String(Math.max(0, at));
    const text = at < 0 ? "nothing is certified at this threshold" : dyvte.boundText(bounds[at]);
    return dyvte.make("label", { class: "slider" }, "Risk ", dial, dyvte.make("output", {}, text));
  }

  setThreshold(value) {
    const turn = this.turn;
    turn.threshold = value;
    const own = turn.columns.own;
    const traced = turn.traced;
    if (traced === null || traced.gate_probabilities === null) {
      own.schedule = `gates@${Number(value.toFixed(3))}`;
      this.onThreshold(this, value);
    } else {
      const gates = this.settings.gates;
      const k = dyvte.exitLayer(traced.gate_probabilities, value, gates.min_layer, traced.num_layers, gates.fallback);
      this.follow(own, k, `gates@${Number(value.toFixed(3))}`);
    }
    this.drawColumns();
    this.drawExits();
  }

  /* A layer of the strip: the third column shows it, from the trace. */
  chooseLayer(k) {
    this.turn.layer = k;
    this.follow(this.turn.columns.own, k, `fixed:${k}`);
    this.drawColumns();
    this.drawExits();
  }

  follow(column, k, schedule) {
    const traced = this.turn.traced;
    this.turn.layer = k;
    Object.assign(column, {
      text: traced.answers[k],
      report: dyvte.reportAt(traced, k),
      firstToken: null,
      schedule,
      state: "done",
    });
  }
};

dyvte.boundText = function (bound) {
  if (bound === null) {
    return "the image never leaves";
  }
  const chance = `probability ${dyvte.percent(1 - bound.delta)}`;
  if (bound.loss === "same_answer") {
    return `at most ${Number((100 * bound.alpha).toPrecision(3))} % of answers differ (${chance})`;
  }
  return `mean loss ${bound.loss} at most ${bound.alpha} (${chance})`;
};
