"use strict";
/* What the page shows of which runs, and the little that all sections build with. Every text from
   a log goes in as text, never as HTML. */
const Report = (() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const { runs, scales, token } = read("data");
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
  const tinted = (element, run) => {
    element.style.setProperty("--run", Charts.colour(run));
    element.dataset.run = run;
    return element;
  };
  const visible = () =>
    runs.map((run, i) => ({ ...run, index: i })).filter((run) => shown[run.index]);
  const curvesOf = (field, dash, label) =>
    visible().flatMap((run) => {
      const series = Packed.series(run.series[field]);
      return series
        ? [{ run: run.index, name: label ? `${run.name} ${label}` : run.name, series, dash }]
        : [];
    });
  const eventsOf = () =>
    visible().map((run) => ({ run: run.index, name: run.name, events: run.events.map(described) }));

  /* Takes in what a live server has to tell; the names of the parts that changed. */
  function merge(news) {
    for (const name of Object.keys(scales)) delete scales[name];
    Object.assign(scales, news.scales);
    const changed = new Set();
    for (const [i, { maps, ...parts }] of news.runs.entries()) {
      Object.assign(runs[i], parts);
      for (const name of Object.keys(parts)) changed.add(name);
      for (const [name, map] of Object.entries(maps)) {
        changed.add("maps");
        if (map === null) delete runs[i].maps[name];
        else if ("from" in map) (runs[i].maps[name].later ??= []).push(map);
        else runs[i].maps[name] = map;
      }
    }
    return changed;
  }

  /* Names: tcs, g_mean_attn, tcs_segment_1, … → what captions.json says of the stem. */
  function about(field) {
    const [, bare, segment] = field.match(/^(.*?)(?:_segment_(\d+))?$/s);
    const [, stem, branch] = bare.match(/^(.*?)(?:_(attn|ffn))?$/s);
    const name = [bare, stem].find((candidate) => Object.hasOwn(captions, candidate));
    const unknown = { title: field.replaceAll("_", " "), formula: "", caption: "" };
    const known = name === undefined ? unknown : captions[name];
    const where = name !== stem ? "" : { attn: ", attention", ffn: ", FFN" }[branch] || "";
    return { ...known, title: known.title + where + (segment ? `, segment ${segment}` : "") };
  }
  function described(event) {
    const level = ["info", "warning", "alarm"].includes(event.level) ? event.level : "info";
    const what = event.verdict ?? event.event ?? level;
    const title = event.verdict ? `${level}: ${what}` : String(what);
    return {
      ...event,
      // a run's own line counts the updates made; the verdict is of the step after them
      step: level === "info" ? event.step : (event.at_step ?? event.step),
      level,
      what: String(what),
      title: event.layer != null ? `${title}, layer ${event.layer}` : title,
    };
  }

  return {
    runs,
    scales,
    shown,
    $,
    make,
    dot,
    tinted,
    visible,
    curvesOf,
    eventsOf,
    about,
    described,
    merge,
    token,
  };
})();
