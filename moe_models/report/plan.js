"use strict";
// The plan's data, and what is read out of it: nothing here knows how long anything takes or how much it needs.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const AXES = ["gpus", "lengths", "micro", "skews"];
/** Places on the axes. The micro-batch has one place more, the first: the best one of each layout. */
const shown = { gpus: 0, lengths: 0, micro: 0, skews: 0, layout: 0, dimension: "", batch: "one" };
const sum = (values) => values.reduce((all, one) => all + one, 0);

/** A prediction with names for what Python wrote as a list. */
function named(layout, gpus, length, micro_batch, accumulation, recompute, row) {
  const memory = row.slice(1, 1 + data.parts.length);
  const time = row.slice(1 + data.parts.length, -1).map((tenths) => tenths / 1e4);
  const count = data.axes.gpus[gpus];
  const tokens = (micro_batch * accumulation * count * length) / data.layouts[layout].worlds[gpus].split;
  return {
    layout, gpus, verdict: row[0], memory, time, needed: sum(memory), seconds: sum(time), micro_batch, recompute,
    accumulation, host: row.at(-1), tokens, speed: tokens / sum(time), each: tokens / sum(time) / count,
  };
}

/** What is predicted for a place of the sliders; null where the layout cannot be. */
function planOf(layout, gpus, length, micro, recompute, skew) {
  const cell = data.layouts[layout].worlds[gpus]?.cells[(length * data.axes.micro.length + micro) * 2 + recompute];
  if (!cell) return null;
  const plan = named(layout, gpus, data.axes.lengths[length], data.axes.micro[micro], cell.acc, recompute, cell.at[skew]);
  return { ...plan, flows: cell.flows };
}

/** As the planner ranks: by verdict, then speed; runs that are as fast as their first one by memory. */
function ranked(plans) {
  const bySpeed = plans.toSorted((one, other) => one.verdict - other.verdict || other.each - one.each);
  const runs = [];
  for (const plan of bySpeed) {
    const first = runs.at(-1)?.[0];
    const alike = first && first.verdict === plan.verdict && (plan.verdict === 2 || plan.each > (1 - data.alike) * first.each);
    if (alike) runs.at(-1).push(plan);
    else runs.push([plan]);
  }
  return runs.flatMap((run) => run.toSorted((one, other) => one.needed - other.needed));
}

/** The batch of a layout: the best one for the plan's tokens in a step, or the best with the micro-batch that the reader chose. */
function bestOf(layout, gpus = shown.gpus) {
  const micros = shown.micro === 0 ? data.axes.micro.map((_, n) => n) : [shown.micro - 1];
  const plans = micros.flatMap((micro) => [0, 1].map((recompute) => planOf(layout, gpus, shown.lengths, micro, recompute, shown.skews)));
  const most = data.sequences * data.axes.gpus[gpus] * data.axes.lengths[shown.lengths];
  const there = plans.filter((plan) => plan !== null && (shown.micro > 0 || plan.tokens < 1.001 * most));
  return ranked(there)[0] ?? null;
}

/** The layouts that can be, best first. */
function ranking() {
  return ranked(data.layouts.map((_, n) => bestOf(n)).filter((plan) => plan !== null));
}

const gib = (mib) => (mib / 1024).toFixed(1);
const percent = (share) => `${Math.round(100 * share)}%`;

/** Bytes on the wire, in powers of ten. */
function amount(bytes) {
  for (const [unit, size] of [["TB", 1e12], ["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (bytes >= size) return `${(bytes / size).toPrecision(3)} ${unit}`;
  }
  return `${bytes} B`;
}

/** Hours of the run and what they cost, where its tokens and the price are known. */
function runOf(plan) {
  const { tokens, price } = data.run;
  if (!tokens) return "";
  const gpuHours = tokens / plan.each / 3600;
  const hours = gpuHours / data.axes.gpus[plan.gpus];
  const cost = price ? `, ${whole.format(Math.round(gpuHours * price))}` : "";
  return `${hours < 10 ? hours.toFixed(1) : whole.format(Math.round(hours))} hours${cost}`;
}

function seconds(time) {
  return time >= 0.0995 ? `${time.toFixed(2)} s` : `${(1e3 * time).toFixed(1)} ms`;
}
