"use strict";
/* The page: what stands in each section. Every text from a log goes in as text, never as HTML. */
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const { runs, scales } = read("data");
  const captions = read("captions");
  const $ = (id) => document.getElementById(id);
  const shown = runs.map(() => true);

  function make(tag, { text, cls, ...attributes } = {}, ...children) {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (cls) element.className = cls;
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }
  const dot = () => make("span", { cls: "dot" });
  const tinted = (element, run) => { element.style.setProperty("--run", Charts.colour(run)); element.dataset.run = run; return element; };
  const visible = () => runs.map((run, i) => ({ ...run, index: i })).filter((run) => shown[run.index]);
  const curvesOf = (field, dash, label) => visible().flatMap((run) => {
    const series = Packed.series(run.series[field]);
    return series ? [{ run: run.index, name: label ? `${run.name} ${label}` : run.name, series, dash }] : [];
  });
  const eventsOf = () => visible().map((run) => ({ run: run.index, name: run.name, events: run.events.map(described) }));

  /* Names: tcs, g_mean_attn, tcs_segment_1, … → what captions.json says of the stem. */
  function about(field) {
    const [, bare, segment] = field.match(/^(.*?)(?:_segment_(\d+))?$/);
    const [, stem, branch] = bare.match(/^(.*?)(?:_(attn|ffn))?$/);
    const known = captions[bare] || captions[stem] || { title: field.replaceAll("_", " "), formula: "", caption: "" };
    const where = captions[bare] ? "" : { attn: ", attention", ffn: ", FFN" }[branch] || "";
    return { ...known, title: known.title + where + (segment ? `, segment ${segment}` : "") };
  }
  function described(event) {
    const level = ["info", "warning", "alarm"].includes(event.level) ? event.level : "info";
    const what = event.verdict ?? event.event ?? level;
    const title = event.verdict ? `${level}: ${what}` : String(what);
    return { ...event, level, what: String(what), title: event.layer != null ? `${title}, layer ${event.layer}` : title };
  }

  /* At a glance */
  function finite(series) {
    return series ? [...series.mean].map((v, i) => [series.step[i], v]).filter(([, v]) => Number.isFinite(v)) : [];
  }
  const highest = (series) => {
    const tops = series ? [...(series.high || series.mean)].map((v, i) => [series.step[i], v]) : [];
    return tops.filter(([, v]) => Number.isFinite(v)).reduce((a, b) => (a && a[1] >= b[1] ? a : b), null);
  };
  const at = (pair) => (pair ? [Packed.number(pair[1]), `at step ${Packed.step(pair[0])}`] : null);
  function modeRatio(run, branch) {
    const mean = Packed.series(run.series[`depth:g_mean_${branch}`]), ctr = Packed.series(run.series[`depth:g_ctr_${branch}`]);
    if (!mean || !ctr) return null;
    const centred = new Map(finite(ctr));
    return finite(mean).filter(([s]) => centred.get(s) > 0).map(([s, v]) => [s, v / centred.get(s)])
      .reduce((a, b) => (a && a[1] >= b[1] ? a : b), null);
  }
  function fall(run, field) {
    const values = finite(Packed.series(run.series[field])).map(([, v]) => v);
    const last = values.at(-1), top = Math.max(...values);
    return values.length && last > 0 ? [`÷ ${Packed.number(top / last)}`, "from its highest to its last value"] : null;
  }
  const FACTS = [
    ["Last step", (r) => { const l = finite(Packed.series(r.series.loss ?? Object.values(r.series)[0])); return l.length ? [Packed.step(l.at(-1)[0])] : null; }],
    ["Loss, first → last", (r) => { const l = finite(Packed.series(r.series.loss)); return l.length ? [`${Packed.number(l[0][1])} → ${Packed.number(l.at(-1)[1])}`] : null; }],
    ["Lowest loss", (r) => at(finite(Packed.series(r.series.loss)).reduce((a, b) => (a && a[1] <= b[1] ? a : b), null))],
    ["Highest gradient norm", (r) => at(highest(Packed.series(r.series.grad_norm)))],
    ["Highest G_mean / G_ctr, W_O", (r) => at(modeRatio(r, "attn"))],
    ["Highest G_mean / G_ctr, W_2", (r) => at(modeRatio(r, "ffn"))],
    ["Token similarity in the deepest quarter", (r) => at(finite(Packed.series(r.series["depth:tcs"])).at(-1))],
    ["Fall of the query gradient", (r) => fall(r, "grad_query")],
  ];
  function verdict(run) {
    const events = run.events.map(described);
    const first = events.find((e) => e.level === "alarm") || events.find((e) => e.level === "warning");
    if (!first && !run.watched) return { badge: "", label: "not watched", text: "No detector wrote to this run's log; the numbers below speak for themselves." };
    if (!first) return { badge: "calm", label: "no alarm", text: "The detector raised neither a warning nor an alarm." };
    const where = first.layer != null ? `, layer ${first.layer}` : "";
    return { badge: first.level, label: first.what, text: `First ${first.level} at step ${Packed.step(first.step)}${where}. ${first.message ?? ""}` };
  }
  function fillGlance() {
    $("verdicts").replaceChildren(...visible().map((run) => {
      const { badge, label, text } = verdict(run);
      return tinted(make("article", { cls: "card" },
        make("h3", {}, make("span", { text: run.name }), make("span", { text: label, cls: `badge ${badge}` })), make("p", { text })), run.index);
    }));
    const rows = FACTS.map(([name, fact]) => [name, visible().map(fact)]).filter(([, cells]) => cells.some(Boolean));
    const head = make("tr", {}, make("th", { scope: "col" }), ...visible().map((run) => tinted(make("th", { scope: "col" }, dot(), ` ${run.name}`), run.index)));
    const body = rows.map(([name, cells]) => make("tr", {}, make("th", { text: name, scope: "row" }), ...cells.map((cell) => {
      const td = make("td", { text: cell ? cell[0] : "–" });
      if (cell && cell[1]) td.append(make("small", { text: cell[1] }));
      return td;
    })));
    $("facts").replaceChildren(make("thead", {}, head), make("tbody", {}, ...body));
  }

  /* Timeline */
  const fieldNames = [...new Set(runs.flatMap((run) => Object.keys(run.series)))].filter((n) => n !== "loss" && !n.startsWith("depth:"));
  function spreads(curves) {
    const values = curves.flatMap(({ series }) => [...series.mean]).filter((v) => Number.isFinite(v));
    const low = values.reduce((a, b) => Math.min(a, b), Infinity), high = values.reduce((a, b) => Math.max(a, b), -Infinity);
    return low > 0 && high > 20 * low;
  }
  function drawLines(element, curves, options) {
    if (!curves.length) return Charts.absent(element, options.missing);
    return Charts.lines(element, { curves, log: spreads(curves), ...options });
  }
  async function fillTimeline() {
    await drawLines($("plot-loss"), curvesOf("loss"), { events: eventsOf(), log: $("loss-log").checked, yTitle: "loss", missing: "Not recorded: metrics.jsonl has no field loss." });
    const field = $("field").value;
    await drawLines($("plot-field"), curvesOf(field), { events: eventsOf(), yTitle: about(field).title, missing: "Not recorded: metrics.jsonl has no other field." });
  }

  /* Depth × step */
  const mapNames = Object.keys(scales);
  let profileStep = null;
  function fillScale(scale) {
    const at = [0, 0.25, 0.5, 0.75, 1].map((p) => Packed.number(Packed.value(p * Packed.TOP, scale)));
    const ramp = make("div", { cls: "ramp" });
    ramp.style.background = `linear-gradient(to right, ${Charts.RAMP.join(", ")})`;
    const parts = [ramp, make("div", { cls: "ticks" }, ...at.map((text) => make("span", { text })))];
    if (maps.some(({ decoded }) => decoded.broken)) parts.push(make("div", { cls: "broken" }, make("i"), " NaN or infinite"));
    $("scale").replaceChildren(...parts);
  }
  let maps = []; // {run, decoded} of the metric on show
  async function fillDepth() {
    const metric = $("metric").value;
    if (!metric) {
      for (const id of ["metric", "readout", "profile-title"]) $(id).hidden = true;
      Charts.absent($("plot-profile"), "Not recorded: the run has no layers.jsonl with values by layer.");
      return;
    }
    const having = visible().filter((run) => run.maps[metric]);
    maps = await Promise.all(having.map(async (run) => ({ run, decoded: await Packed.map(run.maps[metric]) })));
    const { title, formula, caption } = about(metric);
    $("formula").textContent = formula;
    $("metric-caption").textContent = caption || title;
    fillScale(scales[metric]);
    await drawMaps(metric);
    await showStep(profileStep ?? Math.max(...maps.map(({ decoded }) => decoded.steps.at(-1))), null);
  }
  async function drawMaps(metric) {
    for (const old of $("maps").querySelectorAll(".plot")) Charts.forget(old);
    const edges = maps.flatMap(({ decoded }) => [decoded.steps[0], decoded.steps.at(-1)]);
    const span = Math.max(...edges) - Math.min(...edges) || 1;
    const range = [Math.min(...edges) - span * 0.005, Math.max(...edges) + span * 0.005];
    const layers = Math.max(...maps.map(({ decoded }) => decoded.layers));
    const places = maps.map(({ run }) => tinted(make("div", {}, make("p", { cls: "map-name" }, dot(), make("span", { text: run.name })),
      make("div", { cls: "plot", role: "img", "aria-label": `${about(metric).title} of ${run.name}, layer against step` })), run.index));
    $("maps").replaceChildren(...places);
    for (const [i, { decoded }] of maps.entries()) {
      await Charts.heatmap(places[i].querySelector(".plot"), { decoded, range, layers, onPoint: showSoon });
    }
  }
  let wanted = null;
  function showSoon(step, layer) {
    if (!wanted) requestAnimationFrame(() => { const [s, l] = wanted; wanted = null; showStep(s, l); });
    wanted = [step, layer];
  }
  async function showStep(step, layer) {
    profileStep = step;
    const metric = $("metric").value, scale = scales[metric];
    const curves = maps.map(({ run, decoded }) => {
      const probe = Packed.nearest(decoded.steps, step);
      const values = Array.from({ length: decoded.layers }, (_, l) => Packed.value(decoded.level(l, probe), scale));
      return { run: run.index, name: run.name, values, at: decoded.steps[probe] };
    });
    if (layer !== null) {
      const parts = curves.flatMap(({ name, values, at: probed }) => ["  ", make("b", { text: Packed.number(values[layer]) }), ` ${name} (step ${Packed.step(probed)})`]);
      $("readout").replaceChildren(`Layer ${layer}, ${about(metric).title}: `, ...parts);
    }
    $("profile-title").textContent = `Over depth at step ${Packed.step(step)}`;
    const values = curves.flatMap((c) => c.values);
    if (!values.some(Number.isFinite)) return;
    await Charts.profile($("plot-profile"), { curves: curves.map((c) => ({ ...c, values: c.values.map((v) => (Number.isFinite(v) ? v : null)) })), scale, yTitle: about(metric).title });
  }

  /* Writers, law, extinction */
  async function fillModes() {
    for (const branch of ["attn", "ffn"]) {
      const curves = [...curvesOf(`depth:g_mean_${branch}`, undefined, "G_mean"), ...curvesOf(`depth:g_ctr_${branch}`, "dash", "G_ctr")];
      await drawLines($(`plot-modes-${branch}`), curves, { events: eventsOf(), log: true, yTitle: "norm", missing: `Not recorded: layers.jsonl has neither g_mean_${branch} nor g_ctr_${branch}.` });
    }
  }
  async function fillLaw() {
    for (const branch of ["attn", "ffn"]) {
      const element = $(`plot-law-${branch}`), note = $(`note-law-${branch}`);
      let below = 0, all = 0;
      const groups = visible().filter((run) => run.alignment[branch]).map((run) => {
        const packed = run.alignment[branch];
        const x = Packed.float32(packed.envelope), y = Packed.float32(packed.excess), step = Packed.float64(packed.step), layer = Packed.float32(packed.layer);
        const kept = [...x.keys()].filter((i) => y[i] > 0);
        below += x.length - kept.length; all += x.length;
        return { run: run.index, name: run.name, x: kept.map((i) => x[i]), y: kept.map((i) => y[i]),
          text: kept.map((i) => `step ${Packed.step(step[i])}, layer ${layer[i]}<br>A − 1 ${Packed.number(y[i])}, envelope ${Packed.number(x[i])}`) };
      });
      note.textContent = below ? `${below} of ${all} points have A − 1 ≤ 0: their tokens cancel, and a logarithmic axis has no place for them.` : "";
      if (groups.some(({ x }) => x.length)) await Charts.scatter(element, { groups, xTitle: "envelope (T−1)κ̂", yTitle: "A − 1" });
      else Charts.absent(element, `Not recorded: layers.jsonl lacks amplification_${branch} or envelope_${branch}.`);
    }
  }
  const fillExtinction = () => drawLines($("plot-qk"), [...curvesOf("grad_query", undefined, "queries"), ...curvesOf("grad_key", "dash", "keys")],
    { events: eventsOf(), log: true, yTitle: "gradient norm", missing: "Not recorded: neither grad_query nor grad_key. A model without attention has none." });

  /* Samples, autopsy, settings */
  function fillSamples() {
    const having = visible().filter((run) => run.pictures.length);
    $("samples").hidden = !having.length;
    $("strips").replaceChildren(...having.map((run) => tinted(make("div", {}, make("p", { cls: "map-name" }, dot(), make("span", { text: run.name })),
      make("div", { cls: "strip" }, ...run.pictures.map((p) => make("figure", {}, make("img", { src: p.data, alt: `Sample ${p.name} of ${run.name}` }), make("figcaption", { text: p.name }))))), run.index)));
  }
  const HEAD = new Set(["step", "level", "verdict", "event", "kind", "type", "layer", "message", "evidence", "time", "what", "title"]);
  function evidence(event) {
    const rest = Object.entries(event).filter(([name]) => !HEAD.has(name));
    const inside = event.evidence && typeof event.evidence === "object" ? Object.entries(event.evidence) : event.evidence != null ? [["evidence", event.evidence]] : [];
    return [...inside, ...rest].map(([name, v]) => [name, typeof v === "number" ? Packed.number(v) : typeof v === "string" ? v : JSON.stringify(v)]);
  }
  const clock = ({ time }) => (typeof time === "number" ? { title: new Date(time * 1000).toString() } : {});
  function eventItem(event) {
    const item = make("div", { cls: "event" }, make("span", { cls: "when", text: `step ${Packed.step(event.step)}`, ...clock(event) }), make("span", { cls: `badge ${event.level}`, text: event.title }));
    if (event.message) item.append(make("div", { text: event.message }));
    const numbers = evidence(event);
    if (numbers.length) item.append(make("dl", {}, ...numbers.flatMap(([name, text]) => [make("dt", { text: name }), make("dd", { text })])));
    return item;
  }
  function fillAutopsy() {
    const level = $("level").value;
    const passes = (e) => level === "all" || e.level === "alarm" || (level === "serious" && e.level === "warning");
    $("events").replaceChildren(...visible().map((run) => {
      const events = run.events.map(described).filter(passes);
      const list = events.length ? events.map(eventItem) : [make("p", { cls: "note", text: run.events.length ? "No event of this level." : "No events were recorded." })];
      return tinted(make("article", { cls: "card" }, make("h3", { text: run.name }), make("div", { cls: "event-list", tabindex: "0" }, ...list)), run.index);
    }));
  }
  function settingsTable(names) {
    const head = make("tr", {}, make("th", { text: "setting" }), ...visible().map((run) => make("th", { text: run.name })));
    const rows = names.map((name) => make("tr", {}, make("th", { text: name, scope: "row" }), ...visible().map((run) => make("td", { text: run.settings[name] ?? "–" }))));
    return make("div", { cls: "scroll" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));
  }
  function fillSettings() {
    const names = [...new Set(visible().flatMap((run) => Object.keys(run.settings)))];
    const differing = names.filter((name) => new Set(visible().map((run) => run.settings[name])).size > 1);
    const parts = [];
    if (differing.length) parts.push(make("h3", { text: "Where the runs differ" }), settingsTable(differing));
    if (names.length) parts.push(make("details", {}, make("summary", { text: `All ${names.length} settings` }), settingsTable(names)));
    $("settings-body").replaceChildren(...parts);
    $("notes").replaceChildren(...visible().flatMap((run) => run.notes.map((note) => make("li", { text: `${run.name}: ${note}` }))));
    $("settings").hidden = !parts.length && !$("notes").children.length;
  }

  /* Filling: what is on the screen at once, what is below it when it comes near. */
  const SECTIONS = {
    glance: fillGlance, timeline: fillTimeline, depth: fillDepth, modes: fillModes, law: fillLaw,
    extinction: fillExtinction, samples: fillSamples, autopsy: fillAutopsy, settings: fillSettings,
  };
  const filled = new Set();
  async function fill(id) {
    filled.add(id);
    await SECTIONS[id]();
    $(id).dataset.filled = "yes";
  }
  async function refill() { for (const id of filled) await SECTIONS[id](); }

  function fillChips() {
    $("runs").replaceChildren(...runs.map((run, i) => {
      const chip = tinted(make("button", { cls: "chip", type: "button", "aria-pressed": String(shown[i]), title: "Show or hide this run" }, dot(), make("span", { text: run.name })), i);
      chip.onclick = () => {
        shown[i] = !shown[i];
        if (!shown.some(Boolean)) shown[i] = true;
        chip.setAttribute("aria-pressed", String(shown[i]));
        refill();
      };
      return chip;
    }));
  }
  function fillSelect(id, names) {
    $(id).replaceChildren(...names.map((name) => make("option", { value: name, text: about(name).title })));
    $(id).disabled = !names.length;
  }
  async function retint() {
    for (const element of document.querySelectorAll("[data-run]")) element.style.setProperty("--run", Charts.colour(Number(element.dataset.run)));
    await Charts.redrawAll();
  }

  fillChips();
  fillSelect("field", [...fieldNames].sort((a, b) => (b === "grad_norm") - (a === "grad_norm")));
  fillSelect("metric", mapNames);
  $("loss-log").onchange = $("field").onchange = () => fill("timeline");
  $("metric").onchange = () => fill("depth");
  $("level").onchange = () => fill("autopsy");
  $("theme").onclick = () => { document.documentElement.dataset.theme = Charts.dark() ? "light" : "dark"; retint(); };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", retint);
  const near = new IntersectionObserver(async (entries) => {
    const arriving = entries.filter((entry) => entry.isIntersecting).map(({ target }) => target);
    for (const section of arriving) near.unobserve(section);
    for (const section of arriving) {
      await fill(section.id);
      await new Promise((go) => setTimeout(go)); // lets the browser show it before the next
    }
  }, { rootMargin: "400px" });
  for (const id of Object.keys(SECTIONS)) near.observe($(id));
})();
