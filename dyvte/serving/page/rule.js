"use strict";
/* What follows from a trace without asking the model again. The rule is that of dyvte.gates.ScheduleRule. */

const dyvte = {};

/* The layer after which the image leaves: the first gate k >= minLayer whose chance is above the threshold;
   a gate without a finite chance makes it leave at the fallback, or never. */
dyvte.exitLayer = function (chances, threshold, minLayer, numLayers, fallback) {
  for (let k = Math.max(1, minLayer); k < numLayers; k++) {
    const chance = chances[k - 1];
    if (chance === null) {
      return fallback === null ? numLayers : Math.max(k, fallback);
    }
    if (chance > threshold) {
      return k;
    }
  }
  return numLayers;
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

/* A schedule that follows from a trace, as the server would report it. */
dyvte.reportAt = function (traced, k) {
  return {
    freeze_layer: k,
    exit_layer: k,
    num_layers: traced.num_layers,
    visual_compute: traced.visual_compute[k],
    kv_bytes: traced.kv_bytes[k],
  };
};
