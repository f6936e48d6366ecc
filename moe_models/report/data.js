"use strict";
// The page's data, and the arithmetic on it: which copy of which token goes from which GPU to which.

const data = JSON.parse(document.getElementById("data").textContent);
const choices = unpack(data.samples.choices, data.samples.wide);
const weights = unpack(data.samples.weights);

function unpack(text, wide = false) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return wide ? new Uint16Array(bytes.buffer) : bytes;
}

/** The copies of a sample's tokens that one layer makes: one for each token and expert that it chose. */
function copiesOf(sample, layer) {
  const { size, weight_unit } = data.samples;
  const start = (sample * data.blocks.length + layer) * size * data.top_k;
  return Array.from({ length: size * data.top_k }, (_, n) => ({
    token: Math.floor(n / data.top_k),
    piece: data.pieces[data.samples.tokens[sample][Math.floor(n / data.top_k)]],
    expert: choices[start + n],
    weight: weights[start + n] * weight_unit,
  }));
}

/** The ranks of a layout on so many GPUs, with names for what Python wrote as lists. */
function gridOf(layout, world) {
  const { title, groups, ranks } = layout.worlds[world];
  const named = ranks.map(([ep, edp, dp, part, first, held], rank) => ({ rank, ep, edp, dp, part, first, held }));
  return { title, groups, ranks: named };
}

/** Sends each copy home: neighbouring tokens live on the same rank, an expert on one rank of each EP group. */
function land(copies, grid) {
  const { groups, ranks } = grid;
  return copies.map((copy) => {
    const from = Math.floor((copy.token * ranks.length) / data.samples.size);
    const group = groups[ranks[from].edp];
    const to = group[Math.floor(copy.expert / ranks[group[0]].held)];
    return { ...copy, from, to, crosses: from !== to };
  });
}

/** What landed copies cost: how many cross, what each rank and each (rank, expert) gets, how much longer the fullest works. */
function cost(landed, members, layout) {
  const received = new Map(members.map((rank) => [rank, 0]));
  const perExpert = new Map();
  for (const { to, expert } of landed) {
    received.set(to, received.get(to) + 1);
    perExpert.set(`${to}/${expert}`, (perExpert.get(`${to}/${expert}`) ?? 0) + 1);
  }
  const crossing = landed.filter((copy) => copy.crosses).length;
  const counts = [...received.values()];
  const fullest = members[counts.indexOf(Math.max(...counts))];
  return {
    copies: landed.length,
    crossing,
    bytes: crossing * data.hidden * layout.bytes,
    received,
    perExpert,
    fullest,
    mean: landed.length / members.length,
    slowdown: maxOverMean(counts),
  };
}

/**
 * Bytes that one GPU sends for a layer's experts in a step of one micro-batch, so that replicas stay equal: gradients
 * reduced and new weights gathered (ZeRO 1 and 2: all-reduce, one gather; ZeRO-3: reduce-scatter, two gathers).
 */
function replicaBytes(layout, replicas) {
  const held = (data.experts / layout.ep) * data.expert_params;
  const gradient = layout.sp > 1 ? 4 : layout.bytes;
  const each = layout.zero === 3 ? gradient + 2 * layout.bytes : 2 * gradient + layout.bytes;
  return (each * held * (replicas - 1)) / replicas;
}

/** Copies' worth of room that native layers send: all ranks fill every expert's share up to the fullest of their group. */
function padded(landed, grid) {
  let rows = 0;
  for (const group of grid.groups) {
    const counts = new Map();
    for (const { from, expert } of landed.filter((copy) => group.includes(copy.from))) {
      counts.set(`${from}/${expert}`, (counts.get(`${from}/${expert}`) ?? 0) + 1);
    }
    const away = data.experts - grid.ranks[group[0]].held;
    rows += counts.size ? group.length * away * Math.max(...counts.values()) : 0;
  }
  return rows;
}

/** Tokens of each EP rank over the whole text, all copies of an expert taken together. */
function rankLoads(layer, ep) {
  const held = data.experts / ep;
  return Array.from({ length: ep }, (_, rank) => sum(data.load[layer].slice(rank * held, (rank + 1) * held)));
}

function sum(values) {
  return values.reduce((total, value) => total + value, 0);
}

function maxOverMean(values) {
  const total = sum(values);
  return total ? (Math.max(...values) * values.length) / total : 1;
}
