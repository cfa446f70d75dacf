"use strict";
/* Curves and scatter plots, and when each section is filled. */
const Page = (() => {
  const { $, make, dot, tinted, visible, curvesOf, eventsOf, about, runs, scales, shown } = Report;
  /* Timeline */
  const fieldNames = () =>
    [...new Set(runs.flatMap((run) => Object.keys(run.series)))]
      .filter((n) => n !== "loss" && !n.startsWith("depth:"))
      .sort((a, b) => (b === "grad_norm") - (a === "grad_norm"));
  function spreads(curves) {
    const values = curves
      .flatMap(({ series }) => [...series.mean])
      .filter((v) => Number.isFinite(v));
    const low = values.reduce((a, b) => Math.min(a, b), Infinity),
      high = values.reduce((a, b) => Math.max(a, b), -Infinity);
    return low > 0 && high > 20 * low;
  }
  function drawLines(element, curves, options) {
    if (!curves.length) return Charts.absent(element, options.missing);
    return Charts.lines(element, { curves, log: spreads(curves), ...options });
  }
  async function fillTimeline() {
    await drawLines($("plot-loss"), curvesOf("loss"), {
      events: eventsOf(),
      log: $("loss-log").checked,
      yTitle: "loss",
      missing: "Not recorded: metrics.jsonl has no field loss.",
    });
    const field = $("field").value;
    await drawLines($("plot-field"), curvesOf(field), {
      events: eventsOf(),
      yTitle: about(field).title,
      missing: "Not recorded: metrics.jsonl has no other field.",
    });
  }

  /* Writers, law, extinction */
  async function fillModes() {
    for (const branch of ["attn", "ffn"]) {
      const curves = [
        ...curvesOf(`depth:g_mean_${branch}`, undefined, "G_mean"),
        ...curvesOf(`depth:g_ctr_${branch}`, "dash", "G_ctr"),
      ];
      await drawLines($(`plot-modes-${branch}`), curves, {
        events: eventsOf(),
        log: true,
        yTitle: "norm",
        missing: `Not recorded: layers.jsonl has neither g_mean_${branch} nor g_ctr_${branch}.`,
      });
    }
  }
  async function fillLaw() {
    for (const branch of ["attn", "ffn"]) {
      const element = $(`plot-law-${branch}`),
        note = $(`note-law-${branch}`);
      let below = 0,
        all = 0;
      const groups = visible()
        .filter((run) => run.alignment[branch])
        .map((run) => {
          const packed = run.alignment[branch];
          const x = Packed.float32(packed.envelope),
            y = Packed.float32(packed.excess),
            step = Packed.float64(packed.step),
            layer = Packed.float32(packed.layer);
          const kept = [...x.keys()].filter((i) => y[i] > 0);
          below += x.length - kept.length;
          all += x.length;
          return {
            run: run.index,
            name: run.name,
            x: kept.map((i) => x[i]),
            y: kept.map((i) => y[i]),
            text: kept.map(
              (i) =>
                `step ${Packed.step(step[i])}, layer ${layer[i]}<br>A − 1 ${Packed.number(y[i])}, envelope ${Packed.number(x[i])}`,
            ),
          };
        });
      note.textContent = below
        ? `${below} of ${all} points have A − 1 ≤ 0: their tokens cancel, and a logarithmic axis has no place for them.`
        : "";
      if (groups.some(({ x }) => x.length))
        await Charts.scatter(element, { groups, xTitle: "envelope (T−1)κ̂", yTitle: "A − 1" });
      else
        Charts.absent(
          element,
          `Not recorded: layers.jsonl lacks amplification_${branch} or envelope_${branch}; train with --probe all, or, in a loop of your own, with Monitor(model, fields=FIELDS); docs/watch.md has the fields.`,
        );
    }
  }
  const fillExtinction = () =>
    drawLines(
      $("plot-qk"),
      [...curvesOf("grad_query", undefined, "queries"), ...curvesOf("grad_key", "dash", "keys")],
      {
        events: eventsOf(),
        log: true,
        yTitle: "gradient norm",
        missing:
          "Not recorded: neither grad_query nor grad_key. A model without attention has none.",
      },
    );

  /* Filling: what is on the screen at once, what is below it when it comes near. */
  const SECTIONS = {
    glance: Glance.fillGlance,
    timeline: fillTimeline,
    depth: Depth.fillDepth,
    modes: fillModes,
    law: fillLaw,
    extinction: fillExtinction,
    samples: Logbook.fillSamples,
    autopsy: Logbook.fillAutopsy,
    settings: Logbook.fillSettings,
  };
  const SHOWS = {
    glance: ["series", "events", "watched", "status"],
    timeline: ["series", "events"],
    depth: ["maps"],
    modes: ["series", "events"],
    law: ["alignment"],
    extinction: ["series", "events"],
    samples: ["pictures"],
    autopsy: ["events"],
    settings: ["settings", "notes"],
  };
  const filled = new Set();
  let queue = Promise.resolve(); // one after the other: a slow one must not draw over a later one
  function enqueue(work) {
    queue = queue.then(work).catch((error) => console.error(error));
    return queue;
  }
  const fill = (id) =>
    enqueue(async () => {
      filled.add(id);
      await SECTIONS[id]();
      $(id).dataset.filled = "yes";
    });
  const refill = () =>
    enqueue(async () => {
      for (const id of filled) await SECTIONS[id]();
    });

  /* News of a live server: what is on the page and changed is drawn again; a section in which the
     reader marks text waits for the next time. */
  const stale = new Set();
  const marked = (id) => !getSelection().isCollapsed && $(id).contains(getSelection().anchorNode);
  function renew(news) {
    const changed = Report.merge(news);
    for (const [id, parts] of Object.entries(SHOWS))
      if (filled.has(id) && parts.some((part) => changed.has(part))) stale.add(id);
    return enqueue(async () => {
      fillSelects();
      for (const id of [...stale].filter((id) => !marked(id))) {
        stale.delete(id);
        const restore = places(id);
        await SECTIONS[id]();
        restore();
      }
    });
  }
  /* What the reader unfolded and scrolled to in a section, put back by the returned function. */
  function places(id) {
    const movable = () => [...$(id).querySelectorAll("details, .event-list, .scroll, .strip")];
    const before = movable().map((e) => [e.open, e.scrollTop, e.scrollLeft]);
    return () =>
      movable().forEach((element, i) => {
        if (i >= before.length) return;
        if (before[i][0] !== undefined) element.open = before[i][0];
        element.scrollTop = before[i][1];
        element.scrollLeft = before[i][2];
      });
  }

  function fillChips() {
    $("runs").replaceChildren(
      ...runs.map((run, i) => {
        const chip = tinted(
          make(
            "button",
            {
              cls: "chip",
              type: "button",
              "aria-pressed": String(shown[i]),
              title: "Show or hide this run",
            },
            dot(),
            make("span", { text: run.name }),
          ),
          i,
        );
        chip.onclick = () => {
          shown[i] = !shown[i];
          if (!shown.some(Boolean)) shown[i] = true;
          chip.setAttribute("aria-pressed", String(shown[i]));
          refill();
        };
        return chip;
      }),
    );
  }
  function fillSelect(id, names) {
    const select = $(id),
      chosen = select.value,
      offered = [...select.options].map(({ value }) => value);
    select.disabled = !names.length;
    if (offered.length === names.length && offered.every((name, i) => name === names[i])) return;
    select.replaceChildren(
      ...names.map((name) => make("option", { value: name, text: about(name).title })),
    );
    if (names.includes(chosen)) select.value = chosen;
  }
  function fillSelects() {
    fillSelect("field", fieldNames());
    fillSelect("metric", Object.keys(scales));
  }
  async function retint() {
    for (const element of document.querySelectorAll("[data-run]"))
      element.style.setProperty("--run", Charts.colour(Number(element.dataset.run)));
    await enqueue(Charts.redrawAll);
  }

  fillChips();
  fillSelects();
  $("loss-log").onchange = $("field").onchange = () => fill("timeline");
  $("metric").onchange = () => fill("depth");
  $("level").onchange = () => fill("autopsy");
  $("theme").onclick = () => {
    document.documentElement.dataset.theme = Charts.dark() ? "light" : "dark";
    retint();
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", retint);
  const near = new IntersectionObserver(
    async (entries) => {
      const arriving = entries.filter((entry) => entry.isIntersecting).map(({ target }) => target);
      for (const section of arriving) near.unobserve(section);
      for (const section of arriving) {
        await fill(section.id);
        await new Promise((go) => setTimeout(go)); // lets the browser show it before the next
      }
    },
    { rootMargin: "400px" },
  );
  for (const id of Object.keys(SECTIONS)) near.observe($(id));

  return { renew };
})();
