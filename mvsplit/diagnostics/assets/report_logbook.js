"use strict";
/* Samples, autopsy, settings and notes: what a run left besides numbers. */
const Logbook = (() => {
  const { $, make, dot, tinted, visible, described } = Report;
  function fillSamples() {
    const having = visible().filter((run) => run.pictures.length);
    $("samples").hidden = !having.length;
    $("strips").replaceChildren(
      ...having.map((run) =>
        tinted(
          make(
            "div",
            {},
            make("p", { cls: "map-name" }, dot(), make("span", { text: run.name })),
            make(
              "div",
              { cls: "strip" },
              ...run.pictures.map((p) =>
                make(
                  "figure",
                  {},
                  make("img", { src: p.data, alt: `Sample ${p.name} of ${run.name}` }),
                  make("figcaption", { text: p.name }),
                ),
              ),
            ),
          ),
          run.index,
        ),
      ),
    );
  }
  const HEAD = new Set([
    "step",
    "level",
    "verdict",
    "event",
    "kind",
    "type",
    "layer",
    "message",
    "evidence",
    "time",
    "what",
    "title",
  ]);
  function evidence(event) {
    const rest = Object.entries(event).filter(([name]) => !HEAD.has(name));
    const inside =
      event.evidence && typeof event.evidence === "object"
        ? Object.entries(event.evidence)
        : event.evidence != null
          ? [["evidence", event.evidence]]
          : [];
    return [...inside, ...rest].map(([name, v]) => [
      name,
      typeof v === "number" ? Packed.number(v) : typeof v === "string" ? v : JSON.stringify(v),
    ]);
  }
  const clock = ({ time }) =>
    typeof time === "number" ? { title: new Date(time * 1000).toString() } : {};
  function eventItem(event) {
    const item = make(
      "div",
      { cls: "event" },
      make("span", { cls: "when", text: `step ${Packed.step(event.step)}`, ...clock(event) }),
      make("span", { cls: `badge ${event.level}`, text: event.title }),
    );
    if (event.message) item.append(make("div", { text: event.message }));
    const numbers = evidence(event);
    if (numbers.length)
      item.append(
        make(
          "dl",
          {},
          ...numbers.flatMap(([name, text]) => [make("dt", { text: name }), make("dd", { text })]),
        ),
      );
    return item;
  }
  function fillAutopsy() {
    const level = $("level").value;
    const passes = (e) =>
      level === "all" || e.level === "alarm" || (level === "serious" && e.level === "warning");
    $("events").replaceChildren(
      ...visible().map((run) => {
        const events = run.events.map(described).filter(passes);
        const list = events.length
          ? events.map(eventItem)
          : [
              make("p", {
                cls: "note",
                text: run.events.length ? "No event of this level." : "No events were recorded.",
              }),
            ];
        return tinted(
          make(
            "article",
            { cls: "card" },
            make("h3", { text: run.name }),
            make("div", { cls: "event-list", tabindex: "0" }, ...list),
          ),
          run.index,
        );
      }),
    );
  }
  function settingsTable(names) {
    const head = make(
      "tr",
      {},
      make("th", { text: "setting" }),
      ...visible().map((run) => make("th", { text: run.name })),
    );
    const rows = names.map((name) =>
      make(
        "tr",
        {},
        make("th", { text: name, scope: "row" }),
        ...visible().map((run) => make("td", { text: run.settings[name] ?? "–" })),
      ),
    );
    return make(
      "div",
      { cls: "scroll" },
      make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)),
    );
  }
  function fillSettings() {
    const names = [...new Set(visible().flatMap((run) => Object.keys(run.settings)))];
    const differing = names.filter(
      (name) => new Set(visible().map((run) => run.settings[name])).size > 1,
    );
    const parts = [];
    if (differing.length)
      parts.push(make("h3", { text: "Where the runs differ" }), settingsTable(differing));
    if (names.length)
      parts.push(
        make(
          "details",
          {},
          make("summary", { text: `All ${names.length} settings` }),
          settingsTable(names),
        ),
      );
    $("settings-body").replaceChildren(...parts);
    $("notes").replaceChildren(
      ...visible().flatMap((run) =>
        run.notes.map((note) => make("li", { text: `${run.name}: ${note}` })),
      ),
    );
    $("settings").hidden = !parts.length && !$("notes").children.length;
  }

  return { fillSamples, fillAutopsy, fillSettings };
})();
