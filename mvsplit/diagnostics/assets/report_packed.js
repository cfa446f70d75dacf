"use strict";
/* Turns what the page carries back into numbers (the other half of report_pack.py). */
const Packed = (() => {
  const NOT_FINITE = 254,
    NOT_MEASURED = 255,
    TOP = 253,
    NOTHING = { steps: new Float64Array(0), levels: new Uint8Array(0) };

  function bytes(base64) {
    const text = atob(base64),
      out = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) out[i] = text.charCodeAt(i);
    return out;
  }
  const float32 = (base64) => (base64 ? new Float32Array(bytes(base64).buffer) : null);
  const float64 = (base64) => (base64 ? new Float64Array(bytes(base64).buffer) : null);

  async function inflate(packed) {
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  function joined(Kind, a, b) {
    const both = new Kind(a.length + b.length);
    both.set(a);
    both.set(b, a.length);
    return both;
  }
  async function part({ from = 0, steps, data }, layers, before) {
    const levels = await inflate(bytes(data));
    for (let i = layers; i < levels.length; i++) levels[i] = (levels[i] + levels[i - layers]) & 255;
    return {
      steps: joined(Float64Array, before.steps.subarray(0, from), float64(steps)),
      levels: joined(Uint8Array, before.levels.subarray(0, from * layers), levels),
    };
  }

  /* {layers, steps, data, later} → {layers, steps, level(layer, probe)}. `later` are probes that
     came since, each with the number `from` that they begin with. The work is done once a part. */
  async function map(packed) {
    const layers = packed.layers;
    let known = packed.decoded ?? (await part(packed, layers, NOTHING));
    while (packed.later?.length) known = await part(packed.later.shift(), layers, known);
    const { steps, levels } = known;
    const level = (layer, probe) => levels[probe * layers + layer];
    packed.decoded = { layers, steps, levels, level, broken: levels.includes(NOT_FINITE) };
    return packed.decoded;
  }

  function series(packed) {
    if (!packed) return null;
    if (!packed.decoded) {
      packed.decoded = {
        stride: packed.stride,
        step: float64(packed.step),
        mean: float32(packed.mean),
        low: float32(packed.low),
        high: float32(packed.high),
        broken: float64(packed.broken),
      };
    }
    return packed.decoded;
  }

  /* A level as the value it stands for; NaN where not measured, Infinity where not finite. */
  function value(level, scale) {
    if (level === NOT_MEASURED) return NaN;
    if (level === NOT_FINITE) return Infinity;
    const part = level / TOP;
    if (!scale.log) return scale.low + part * (scale.high - scale.low);
    return scale.low * Math.pow(scale.high / scale.low, part);
  }

  function nearest(steps, x) {
    let a = 0,
      b = steps.length - 1;
    while (b - a > 1) {
      const middle = (a + b) >> 1;
      if (steps[middle] <= x) a = middle;
      else b = middle;
    }
    return Math.abs(steps[b] - x) < Math.abs(steps[a] - x) ? b : a;
  }

  function number(v) {
    if (v === null || v === undefined || Number.isNaN(v)) return "–";
    if (!Number.isFinite(v)) return "not finite";
    const size = Math.abs(v);
    if (size !== 0 && (size < 1e-3 || size >= 1e5)) {
      const [digits, power] = v.toExponential(2).split("e");
      const raised = [...String(Number(power))].map((c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]);
      return `${digits}·10${raised.join("")}`;
    }
    return String(Number(v.toPrecision(4)));
  }
  const step = (v) => Math.round(v).toLocaleString("en-US").replaceAll(",", "\u2009");

  return {
    float32,
    float64,
    map,
    series,
    value,
    nearest,
    number,
    step,
    NOT_FINITE,
    NOT_MEASURED,
    TOP,
  };
})();
