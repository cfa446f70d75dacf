"use strict";
/* Pictures: lines over steps, maps over depth and step, scatter. One look, one zoom over steps. */
const Charts = (() => {
  const RUNS_LIGHT = [
    "#2f6fb0",
    "#c8502f",
    "#2e8b62",
    "#7d5ba6",
    "#b0831a",
    "#3a8f9e",
    "#b04a7a",
    "#5d6b75",
  ];
  const RUNS_DARK = [
    "#7fb2e8",
    "#f08a68",
    "#72cba0",
    "#b99be0",
    "#dcb458",
    "#78c6d3",
    "#e58fb8",
    "#a5b2bc",
  ];
  const RAMP = [
    "#440154",
    "#472d7b",
    "#3b528b",
    "#2c728e",
    "#21918c",
    "#28ae80",
    "#5ec962",
    "#addc30",
    "#fde725",
  ];
  const drawn = new Map(); // element → function that draws it again
  const overSteps = new Set(); // elements whose x axis is the step
  let zoom = null; // [from, to] of all of them, null: everything

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  function dark() {
    const theme = document.documentElement.dataset.theme;
    return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  }
  const colour = (run) => (dark() ? RUNS_DARK : RUNS_LIGHT)[run % RUNS_LIGHT.length];
  const phone = () => matchMedia("(max-width: 640px)").matches;
  /* Plotly reads a little HTML in texts; what comes from a log must stay text. */
  const plain = (text) =>
    String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

  function axis(title, extra) {
    return {
      title: { text: plain(title), font: { size: 12, color: css("--soft") }, standoff: 6 },
      gridcolor: css("--grid"),
      linecolor: css("--line"),
      zeroline: false,
      automargin: true,
      tickfont: { size: 11, color: css("--soft") },
      exponentformat: "power",
      ...extra,
    };
  }
  const layerAxis = (layers, extra) =>
    axis("layer", { ...(layers <= 12 ? { dtick: 1 } : {}), hoverformat: ",d", ...extra });
  /* Ticks at powers of ten, with 2 and 5 between them where fewer than two powers would show. */
  function logAxis(title, values) {
    let low = Infinity,
      high = 0;
    for (const v of values)
      if (v > 0 && Number.isFinite(v)) {
        low = Math.min(low, v);
        high = Math.max(high, v);
      }
    const decades = Math.log10(high / low);
    return axis(title, {
      type: "log",
      dtick: decades > 1.5 ? Math.max(1, Math.round(decades / 6)) : "D2",
    });
  }
  function layout(extra) {
    return {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      showlegend: false,
      font: { family: "system-ui, sans-serif", size: 12, color: css("--ink") },
      margin: { l: 56, r: 14, t: 12, b: 42 },
      dragmode: phone() ? false : "zoom",
      hoverlabel: {
        bgcolor: css("--card"),
        bordercolor: css("--line"),
        font: { color: css("--ink"), size: 12 },
        namelength: 40,
      },
      ...extra,
    };
  }

  function draw(element, traces, look, stepsAlongX) {
    if (element.classList.contains("absent")) {
      element.classList.remove("absent");
      element.textContent = "";
    }
    if (stepsAlongX) {
      if (zoom) look.xaxis.range = [...zoom];
      look.xaxis.autorange = !look.xaxis.range;
    }
    // What the reader zoomed into stays when the same numbers are drawn again with new ones.
    look.yaxis.uirevision = `${look.yaxis.title.text} ${look.yaxis.type}`;
    const config = {
      displayModeBar: false,
      responsive: true,
      doubleClick: "autosize",
      showTips: false,
    };
    const done = Plotly.react(element, traces, look, config);
    if (stepsAlongX && !overSteps.has(element)) {
      overSteps.add(element);
      element.on("plotly_relayout", (change) => onZoom(element, change));
    }
    return done;
  }
  function forget(element) {
    if (element.data) Plotly.purge(element);
    drawn.delete(element);
    overSteps.delete(element);
  }
  function absent(element, text) {
    forget(element);
    element.classList.add("absent");
    element.textContent = text;
  }
  let following = false;
  async function onZoom(source, change) {
    const reset = change["xaxis.autorange"] === true;
    if (following || (!reset && change["xaxis.range[0]"] === undefined)) return;
    following = true;
    zoom = reset ? null : [change["xaxis.range[0]"], change["xaxis.range[1]"]];
    for (const element of overSteps) {
      const full = element.fullRange;
      const range = zoom || full;
      if (element !== source || (reset && full)) {
        await Plotly.relayout(
          element,
          range ? { "xaxis.range": [...range] } : { "xaxis.autorange": true },
        );
      }
    }
    following = false;
  }

  /* curves: [{run, name, series, dash}] → traces, with a band where a point stands for many steps. */
  function curveTraces(curves) {
    const traces = [];
    for (const { run, name, series, dash } of curves) {
      const line = { color: colour(run), width: dash ? 1.6 : 1.8, dash: dash || "solid" };
      if (series.low) {
        const edge = {
          x: series.step,
          mode: "lines",
          line: { width: 0 },
          hoverinfo: "skip",
          type: "scatter",
        };
        traces.push(
          { ...edge, y: series.low },
          { ...edge, y: series.high, fill: "tonexty", fillcolor: colour(run) + "33" },
        );
      }
      const mode = series.step.length < 3 ? "markers" : "lines";
      traces.push({
        type: "scatter",
        mode,
        x: series.step,
        y: series.mean,
        line,
        marker: { color: colour(run) },
        name: plain(name),
        hovertemplate: "%{y:.4~g}",
        connectgaps: true,
      });
      if (series.broken) {
        traces.push({
          type: "scatter",
          mode: "markers",
          x: series.broken,
          y: Array(series.broken.length).fill(0.03),
          yaxis: "y2",
          marker: { symbol: "x", size: 8, color: css("--broken") },
          name: plain(name),
          hovertemplate: "NaN or infinite",
        });
      }
    }
    return traces;
  }
  function eventTraces(groups) {
    return groups.map(({ run, name, events }, place) => ({
      type: "scatter",
      mode: "markers",
      yaxis: "y2",
      x: events.map((e) => e.step),
      y: events.map(() => 0.97 - 0.06 * place),
      name: plain(name),
      text: events.map((e) => plain(e.title)),
      hovertemplate: "%{text}",
      marker: {
        symbol: "triangle-down",
        size: events.map((e) => ({ alarm: 12, warning: 9 })[e.level] || 6),
        color: colour(run),
        line: { width: 1, color: css("--card") },
      },
    }));
  }
  function alarmLines(groups) {
    return groups.flatMap(({ run, events }) =>
      events
        .filter((e) => e.level === "alarm")
        .slice(0, 20)
        .map((e) => ({
          type: "line",
          xref: "x",
          yref: "paper",
          x0: e.step,
          x1: e.step,
          y0: 0,
          y1: 1,
          line: { color: colour(run), width: 1.2, dash: "dot" },
          layer: "below",
        })),
    );
  }

  function lines(element, { curves, events = [], log = false, yTitle = "" }) {
    const redraw = () => {
      const marked = events.filter((group) => group.events.length);
      const look = layout({
        hovermode: "x unified",
        shapes: alarmLines(marked),
        xaxis: axis("step", { hoverformat: ",d" }),
        yaxis: log
          ? logAxis(
              yTitle,
              curves.flatMap(({ series }) => [...series.mean]),
            )
          : axis(yTitle, {}),
        yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
      });
      return draw(element, [...curveTraces(curves), ...eventTraces(marked)], look, true);
    };
    drawn.set(element, redraw);
    return redraw();
  }

  /* One map. decoded: Packed.map; range: [first, last] step and layers: rows, shared by all runs. */
  function heatmap(element, { decoded, range, layers, onPoint }) {
    const rows = [],
      broken = [];
    let anyBroken = false;
    for (let l = 0; l < decoded.layers; l++) {
      const row = new Float32Array(decoded.steps.length),
        bad = new Float32Array(decoded.steps.length).fill(NaN);
      for (let p = 0; p < row.length; p++) {
        const level = decoded.level(l, p);
        row[p] = level > Packed.TOP ? NaN : level;
        if (level === Packed.NOT_FINITE) {
          bad[p] = 1;
          anyBroken = true;
        }
      }
      rows.push(row);
      broken.push(bad);
    }
    const redraw = () => {
      const shared = { type: "heatmap", x: decoded.steps, showscale: false, hoverinfo: "none" };
      const ramp = RAMP.map((c, i) => [i / (RAMP.length - 1), c]);
      const traces = [{ ...shared, z: rows, zmin: 0, zmax: Packed.TOP, colorscale: ramp }];
      if (anyBroken)
        traces.push({
          ...shared,
          z: broken,
          zmin: 0,
          zmax: 1,
          colorscale: [
            [0, css("--broken")],
            [1, css("--broken")],
          ],
        });
      element.fullRange = range;
      const look = layout({
        hovermode: "closest",
        xaxis: axis("step", { range: [...range], showgrid: false, hoverformat: ",d" }),
        yaxis: layerAxis(layers, { range: [layers - 0.5, -0.5], showgrid: false }),
      });
      return draw(element, traces, look, true);
    };
    const first = !drawn.has(element);
    drawn.set(element, redraw);
    const done = redraw();
    for (const what of first ? ["plotly_hover", "plotly_click"] : []) {
      element.on(what, (event) => onPoint(event.points[0].x, event.points[0].y));
    }
    return done;
  }

  function profile(element, { curves, scale, yTitle }) {
    const redraw = () => {
      const traces = curves.map(({ run, name, values }) => ({
        type: "scatter",
        mode: "lines",
        x: values.map((_, i) => i),
        y: values,
        name: plain(name),
        line: { color: colour(run), width: 1.8 },
        hovertemplate: "%{y:.4~g}",
      }));
      const margin = (scale.high - scale.low) * 0.04;
      const yaxis = scale.log
        ? logAxis(
            yTitle,
            curves.flatMap(({ values }) => values),
          )
        : axis(yTitle, { range: [scale.low - margin, scale.high + margin] });
      const look = layout({
        hovermode: "x unified",
        xaxis: layerAxis(Math.max(...curves.map(({ values }) => values.length)), {}),
        yaxis,
      });
      return draw(element, traces, look, false);
    };
    drawn.set(element, redraw);
    return redraw();
  }

  /* groups: [{run, name, x, y, text}], both axes logarithmic, with the line y = x. */
  function scatter(element, { groups, xTitle, yTitle }) {
    const redraw = () => {
      const traces = groups.map(({ run, name, x, y, text }) => ({
        type: "scatter",
        mode: "markers",
        x,
        y,
        text,
        name: plain(name),
        hovertemplate: "%{text}",
        marker: { color: colour(run), size: 5, opacity: 0.45 },
      }));
      const ends = groups.flatMap(({ x }) => (x.length ? [Math.min(...x), Math.max(...x)] : []));
      const line = [Math.min(...ends), Math.max(...ends)];
      traces.push({
        type: "scatter",
        mode: "lines",
        x: line,
        y: line,
        line: { color: css("--soft"), width: 1.2, dash: "dash" },
        hoverinfo: "skip",
      });
      return draw(
        element,
        traces,
        layout({
          hovermode: "closest",
          xaxis: logAxis(
            xTitle,
            groups.flatMap(({ x }) => x),
          ),
          yaxis: logAxis(
            yTitle,
            groups.flatMap(({ y }) => y),
          ),
        }),
        false,
      );
    };
    drawn.set(element, redraw);
    return redraw();
  }

  async function redrawAll() {
    for (const redraw of drawn.values()) await redraw();
  }
  return { RAMP, colour, dark, lines, heatmap, profile, scatter, absent, forget, redrawAll };
})();
