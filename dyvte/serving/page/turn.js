"use strict";
/* One question with its answers: three columns, and what every exit would have answered. */

dyvte.COLUMNS = ["full", "fixed", "own"];

/* A turn's record; everything on the page, and in a saved page, is drawn from it. */
dyvte.newTurn = function (question, images, schedules) {
  const columns = {};
  for (const name of dyvte.COLUMNS) {
    columns[name] = { schedule: schedules[name], text: "", report: null, firstToken: null, state: "waiting" };
  }
  return { question, images, columns, traced: null, tracing: "waiting", level: null, error: null };
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
    } else if (report.not_certified) {
      add("certified", `no: ${report.not_certified}`);
    }
    return list;
  }

  /* The certificate of what the gates' column shows. */
  boundOf(column) {
    if (column !== this.turn.columns.own || column.report.exit_layer < 0 || !column.schedule.startsWith("gates")) {
      return null;
    }
    if (column.report.certified) {
      return column.report.certified;
    }
    return this.bounds().find((one) => Math.abs(dyvte.levelOf(one.threshold) - this.turn.level) < 1e-9) || null;
  }

  bounds() {
    return this.settings.gates ? this.settings.gates.certificates : [];
  }

  drawExits() {
    const { turn } = this;
    const traced = turn.traced;
    if (traced === null) {
      const text = turn.tracing === "busy" ? "Looking at every schedule …" : "";
      this.exits.replaceChildren(text ? dyvte.make("p", { class: "quiet" }, text) : "");
      return;
    }
    const focused = this.exits.contains(document.activeElement) ? document.activeElement.dataset : {};
    const L = traced.num_layers;
    const own = turn.columns.own.report;
    const chosen = own && own.freeze_layer === own.exit_layer ? own.exit_layer : null;
    const stable = traced.first_stable;
    const generated = `${traced.generated} ${traced.generated === 1 ? "answer" : "answers"}`;
    this.exits.replaceChildren(
      dyvte.make("h3", {}, "The answer if the image had left after layer …"),
      dyvte.strip(traced, chosen, (one) => this.choose(one)),
      dyvte.make(
        "p",
        { class: "quiet" },
        stable === L ? "Only the full model gives its answer." : `From layer ${stable} on, every exit gives the full model's answer.`,
        ` One trace, and ${generated} generated beside it.`,
      ),
      ...(this.settings.gates && turn.level !== null ? this.gateParts(traced) : []),
    );
    const name = focused.layer !== undefined ? "layer" : focused.control !== undefined ? "control" : null;
    if (name !== null) {
      this.exits.querySelector(`[data-${name}="${focused[name]}"]`)?.focus();
    }
  }

  gateParts(traced) {
    const { turn } = this;
    const set = (level) => this.setLevel(level);
    const parts = [dyvte.make("h3", {}, "Each gate's chance, and the threshold")];
    let range = { low: -8, high: 8 };
    if (traced.path.length > 0) {
      const { step, schedule } = dyvte.scheduleAt(traced, turn.level);
      const marks = {
        exits: step.exit_logits,
        freezes: traced.freeze_logits,
        gap: traced.freeze_gap,
        exit: schedule.exit_layer,
        freeze: schedule.freeze_layer,
        level: turn.level,
      };
      range = dyvte.chartRange(marks);
      parts.push(dyvte.gateChart(marks, set));
      if (marks.freezes.some(dyvte.isPossible)) {
        const said = "Bars: the image leaves after this layer. Circles: it freezes, and is only read from there on.";
        parts.push(dyvte.make("p", { class: "quiet" }, said));
      }
    }
    const slider = dyvte.make("input", {
      type: "range",
      min: range.low,
      max: range.high,
      step: 0.05,
      "data-control": "threshold",
      "aria-valuetext": dyvte.thresholdText(turn.level),
      oninput: (event) => set(Number(event.target.value)),
    });
    slider.value = String(turn.level);
    const shown = dyvte.make("output", {}, dyvte.thresholdText(turn.level));
    parts.push(dyvte.make("label", { class: "slider" }, "Threshold ", slider, shown));
    if (this.bounds().length > 0) {
      parts.push(this.dial());
    }
    return parts;
  }

  /* Bounds that calibration proved, from the strictest on; before them: never leave. */
  dial() {
    const stops = [null, ...this.bounds()];
    const levelOf = (one) => (one === null ? dyvte.NEVER : dyvte.levelOf(one.threshold));
    const at = stops.findIndex((one) => Math.abs(levelOf(one) - this.turn.level) < 1e-9);
    const text = at < 0 ? "nothing is certified at this threshold" : dyvte.boundText(stops[at]);
    const dial = dyvte.make("input", {
      type: "range",
      min: 0,
      max: stops.length - 1,
      step: 1,
      "data-control": "risk",
      "aria-valuetext": text,
      oninput: (event) => this.setLevel(levelOf(stops[Number(event.target.value)])),
    });
    dial.value = String(Math.max(0, at));
    return dyvte.make("label", { class: "slider" }, "Risk ", dial, dyvte.make("output", {}, text));
  }

  setLevel(level) {
    this.turn.level = level;
    const { traced, columns } = this.turn;
    const name = `gates@${dyvte.thresholdText(level)}`;
    if (traced.path.length > 0) {
      this.follow(dyvte.scheduleAt(traced, level).schedule, name);
    } else {
      columns.own.schedule = name;
      this.onThreshold(this, dyvte.thresholdOf(level));
    }
    this.drawColumns();
    this.drawExits();
  }

  /* A layer of the strip: the third column shows it, from the trace. */
  choose(one) {
    this.follow(one, dyvte.scheduleText(one));
    this.drawColumns();
    this.drawExits();
  }

  follow(one, name) {
    const numLayers = this.turn.traced.num_layers;
    Object.assign(this.turn.columns.own, {
      text: one.answer,
      report: { ...one, num_layers: numLayers },
      firstToken: null,
      schedule: name,
      state: "done",
    });
  }
};
