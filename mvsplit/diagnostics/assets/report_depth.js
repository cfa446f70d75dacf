"use strict";
/* Depth × step maps, the value under the pointer, and the profile over depth. */
const Depth = (() => {
  const { $, make, dot, tinted, visible, about, scales } = Report;
  let pointedStep = null; // null: the last probe
  function fillScale(scale) {
    const at = [0, 0.25, 0.5, 0.75, 1].map((p) =>
      Packed.number(Packed.value(p * Packed.TOP, scale)),
    );
    const ramp = make("div", { cls: "ramp" });
    ramp.style.background = `linear-gradient(to right, ${Charts.RAMP.join(", ")})`;
    const parts = [
      ramp,
      make("div", { cls: "ticks" }, ...at.map((text) => make("span", { text }))),
    ];
    if (maps.some(({ decoded }) => decoded.broken))
      parts.push(make("div", { cls: "broken" }, make("i"), " NaN or infinite"));
    $("scale").replaceChildren(...parts);
  }
  let maps = []; // {run, decoded} of the metric on show
  async function fillDepth() {
    const metric = $("metric").value;
    const having = visible().filter((run) => Object.hasOwn(run.maps, metric));
    for (const id of ["readout", "profile-title"]) $(id).hidden = !having.length;
    if (!having.length) return fillNothing();
    maps = await Promise.all(
      having.map(async (run) => ({ run, decoded: await Packed.map(run.maps[metric]) })),
    );
    const { title, formula, caption } = about(metric);
    $("formula").textContent = formula;
    $("metric-caption").textContent = caption || title;
    fillScale(scales[metric]);
    await drawMaps(metric);
    await showStep(
      pointedStep ?? Math.max(...maps.map(({ decoded }) => decoded.steps.at(-1))),
      null,
    );
  }
  function fillNothing() {
    forgetMaps();
    $("scale").replaceChildren();
    const why = Object.keys(scales).length
      ? "Not recorded by any run on show."
      : "Not recorded: there is no layers.jsonl with values by layer.";
    Charts.absent($("plot-profile"), why);
  }
  function forgetMaps() {
    for (const old of $("maps").querySelectorAll(".plot")) Charts.forget(old);
    $("maps").replaceChildren();
  }
  /* The first and the last probe reach as far outwards as half-way to their neighbour. */
  function outerEdges(steps) {
    if (steps.length === 1) return [steps[0] - 0.5, steps[0] + 0.5];
    return [1.5 * steps[0] - 0.5 * steps[1], 1.5 * steps.at(-1) - 0.5 * steps.at(-2)];
  }
  function mapPlace(run) {
    const plot = make("div", { cls: "plot", role: "img" });
    const name = make("p", { cls: "map-name" }, dot(), make("span", { text: run.name }));
    return tinted(make("div", {}, name, plot), run.index);
  }
  /* The places of the runs on show: those on the page where they are the same, so that a page that
     is told of a new probe does not jump. */
  function mapPlaces() {
    const places = [...$("maps").children];
    const same = places.map((place) => place.dataset.run).join();
    if (same === maps.map(({ run }) => run.index).join()) return places;
    forgetMaps();
    $("maps").replaceChildren(...maps.map(({ run }) => mapPlace(run)));
    return [...$("maps").children];
  }
  async function drawMaps(metric) {
    const edges = maps.flatMap(({ decoded }) => outerEdges(decoded.steps));
    const range = [Math.min(...edges), Math.max(...edges)];
    const layers = Math.max(...maps.map(({ decoded }) => decoded.layers));
    const places = mapPlaces();
    for (const [i, { run, decoded }] of maps.entries()) {
      const plot = places[i].querySelector(".plot");
      const label = `${about(metric).title} of ${run.name}, layer against step`;
      plot.setAttribute("aria-label", label);
      await Charts.heatmap(plot, { decoded, range, layers, onPoint: showSoon });
    }
  }
  let wanted = null;
  function showSoon(step, layer) {
    if (!wanted)
      requestAnimationFrame(() => {
        const [s, l] = wanted;
        wanted = null;
        pointedStep = s;
        showStep(s, l);
      });
    wanted = [step, layer];
  }
  async function showStep(step, layer) {
    const metric = $("metric").value,
      scale = scales[metric];
    const curves = maps.map(({ run, decoded }) => {
      const probe = Packed.nearest(decoded.steps, step);
      const values = Array.from({ length: decoded.layers }, (_, l) =>
        Packed.value(decoded.level(l, probe), scale),
      );
      return { run: run.index, name: run.name, values, at: decoded.steps[probe] };
    });
    if (layer !== null) {
      const parts = curves.flatMap(({ name, values, at: probed }) => [
        "  ",
        make("b", { text: Packed.number(values[layer]) }),
        ` ${name} (step ${Packed.step(probed)})`,
      ]);
      $("readout").replaceChildren(`Layer ${layer}, ${about(metric).title}: `, ...parts);
    }
    $("profile-title").textContent = `Over depth at step ${Packed.step(step)}`;
    const values = curves.flatMap((c) => c.values);
    if (!values.some(Number.isFinite)) return;
    await Charts.profile($("plot-profile"), {
      curves: curves.map((c) => ({
        ...c,
        values: c.values.map((v) => (Number.isFinite(v) ? v : null)),
      })),
      scale,
      yTitle: about(metric).title,
    });
  }

  return { fillDepth };
})();
