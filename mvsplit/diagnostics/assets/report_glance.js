"use strict";
/* The verdict on each run and its numbers in one table. */
const Glance = (() => {
  const { $, make, dot, tinted, visible, described } = Report;
  function finite(series) {
    return series
      ? [...series.mean].map((v, i) => [series.step[i], v]).filter(([, v]) => Number.isFinite(v))
      : [];
  }
  const highest = (series) => {
    const tops = series ? [...(series.high || series.mean)].map((v, i) => [series.step[i], v]) : [];
    return tops
      .filter(([, v]) => Number.isFinite(v))
      .reduce((a, b) => (a && a[1] >= b[1] ? a : b), null);
  };
  const at = (pair) => (pair ? [Packed.number(pair[1]), `at step ${Packed.step(pair[0])}`] : null);
  function modeRatio(run, branch) {
    const mean = Packed.series(run.series[`depth:g_mean_${branch}`]),
      ctr = Packed.series(run.series[`depth:g_ctr_${branch}`]);
    if (!mean || !ctr) return null;
    const centred = new Map(finite(ctr));
    return finite(mean)
      .filter(([s]) => centred.get(s) > 0)
      .map(([s, v]) => [s, v / centred.get(s)])
      .reduce((a, b) => (a && a[1] >= b[1] ? a : b), null);
  }
  function fall(run, field) {
    const values = finite(Packed.series(run.series[field])).map(([, v]) => v);
    const last = values.at(-1),
      top = Math.max(...values);
    return values.length && last > 0
      ? [`÷ ${Packed.number(top / last)}`, "from its highest to its last value"]
      : null;
  }
  const FACTS = [
    [
      "Last step",
      (r) => {
        const l = finite(Packed.series(r.series.loss ?? Object.values(r.series)[0]));
        return l.length ? [Packed.step(l.at(-1)[0])] : null;
      },
    ],
    [
      "Loss, first → last",
      (r) => {
        const l = finite(Packed.series(r.series.loss));
        return l.length ? [`${Packed.number(l[0][1])} → ${Packed.number(l.at(-1)[1])}`] : null;
      },
    ],
    [
      "Lowest loss",
      (r) =>
        at(
          finite(Packed.series(r.series.loss)).reduce((a, b) => (a && a[1] <= b[1] ? a : b), null),
        ),
    ],
    ["Highest gradient norm", (r) => at(highest(Packed.series(r.series.grad_norm)))],
    ["Highest G_mean / G_ctr, W_O", (r) => at(modeRatio(r, "attn"))],
    ["Highest G_mean / G_ctr, W_2", (r) => at(modeRatio(r, "ffn"))],
    [
      "Token similarity in the deepest quarter",
      (r) => at(finite(Packed.series(r.series["depth:tcs"])).at(-1)),
    ],
    ["Fall of the query gradient", (r) => fall(r, "grad_query")],
  ];
  function verdict(run) {
    if (run.status === "waiting")
      return { badge: "", label: "not begun", text: "There is no log yet; it is waited for." };
    const events = run.events.map(described);
    const first =
      events.find((e) => e.level === "alarm") || events.find((e) => e.level === "warning");
    if (!first && !run.watched)
      return {
        badge: "",
        label: "no verdict",
        text: "No detector says that it looked on while this log was written; mvsplit monitor replay looks now.",
      };
    if (!first)
      return {
        badge: "calm",
        label: "no alarm",
        text: "The detector raised neither a warning nor an alarm.",
      };
    const where = first.layer != null ? `, layer ${first.layer}` : "";
    return {
      badge: first.level,
      label: first.what,
      text: `First ${first.level} at step ${Packed.step(first.step)}${where}. ${first.message ?? ""}`,
    };
  }
  function fillGlance() {
    $("verdicts").replaceChildren(
      ...visible().map((run) => {
        const { badge, label, text } = verdict(run);
        return tinted(
          make(
            "article",
            { cls: "card" },
            make(
              "h3",
              {},
              make("span", { text: run.name }),
              make("span", { text: label, cls: `badge ${badge}` }),
            ),
            make("p", { text }),
          ),
          run.index,
        );
      }),
    );
    const rows = FACTS.map(([name, fact]) => [name, visible().map(fact)]).filter(([, cells]) =>
      cells.some(Boolean),
    );
    const head = make(
      "tr",
      {},
      make("th", { scope: "col" }),
      ...visible().map((run) =>
        tinted(make("th", { scope: "col" }, dot(), ` ${run.name}`), run.index),
      ),
    );
    const body = rows.map(([name, cells]) =>
      make(
        "tr",
        {},
        make("th", { text: name, scope: "row" }),
        ...cells.map((cell) => {
          const td = make("td", { text: cell ? cell[0] : "–" });
          if (cell && cell[1]) td.append(make("small", { text: cell[1] }));
          return td;
        }),
      ),
    );
    $("facts").replaceChildren(make("thead", {}, head), make("tbody", {}, ...body));
  }

  return { fillGlance };
})();
