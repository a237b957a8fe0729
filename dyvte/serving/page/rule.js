"use strict";
/* What follows from a trace without asking the model again, and how numbers are written. */

const dyvte = {};

/* Thresholds are kept as levels, log(t / (1 - t)): gates spread their decisions over as many of them. */
dyvte.NEVER = 60;
dyvte.levelOf = function (threshold) {
  if (threshold <= 0) {
    return -dyvte.NEVER;
  }
  return threshold >= 1 ? dyvte.NEVER : Math.max(-dyvte.NEVER, Math.min(dyvte.NEVER, Math.log(threshold / (1 - threshold))));
};
dyvte.thresholdOf = (level) => (level >= dyvte.NEVER ? 1 : 1 / (1 + Math.exp(-level)));
dyvte.thresholdText = function (level) {
  const threshold = dyvte.thresholdOf(level);
  if (level > 5 && level < dyvte.NEVER) {
    return `1 - ${Math.exp(-level).toPrecision(2)}`;
  }
  return level < -5 ? threshold.toPrecision(2) : String(Number(threshold.toFixed(3)));
};

/* The schedule that holds at a level: that of the last step which begins at or below it. */
dyvte.scheduleAt = function (traced, level) {
  let found = traced.path[0];
  for (const step of traced.path) {
    if (step.level === null || step.level <= level) {
      found = step;
    }
  }
  return { step: found, schedule: traced.schedules[found.schedule] };
};

/* Layers 1..L in words, for those who do not see the bar. */
dyvte.depthText = function (freeze, exit, numLayers) {
  if (exit < 0) {
    return "no image";
  }
  const parts = [];
  const span = (from, to) => (from === to ? `layer ${from}` : `layers ${from} to ${to}`);
  if (freeze > 0) {
    parts.push(`updated in ${span(1, freeze)}`);
  }
  if (exit > freeze) {
    parts.push(`read in ${span(freeze + 1, exit)}`);
  }
  if (numLayers > exit) {
    parts.push(`gone in ${span(exit + 1, numLayers)}`);
  }
  return `Visual tokens ${parts.join(", ")}`;
};

dyvte.scheduleText = (one) =>
  one.freeze_layer === one.exit_layer ? `fixed:${one.exit_layer}` : `freeze:${one.freeze_layer}:${one.exit_layer}`;

dyvte.bytes = function (count) {
  const units = ["B", "KiB", "MiB", "GiB"];
  let at = 0;
  while (count >= 1024 && at < units.length - 1) {
    count /= 1024;
    at += 1;
  }
  return `${count >= 100 || at === 0 ? count.toFixed(0) : count.toFixed(1)} ${units[at]}`;
};

dyvte.percent = (share) => (share === null ? "-" : `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`);

dyvte.boundText = function (bound) {
  if (bound === null) {
    return "the image never leaves";
  }
  const chance = `with probability ${dyvte.percent(1 - bound.delta)}`;
  const whose = bound.group ? `, questions of group ${bound.group}` : "";
  if (bound.loss === "same_answer") {
    return `at most ${Number((100 * bound.alpha).toPrecision(3))} % of answers differ, ${chance}${whose}`;
  }
  return `mean loss ${bound.loss} at most ${bound.alpha}, ${chance}${whose}`;
};
