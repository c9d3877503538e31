// Draws the report from the JSON in #data. Whatever comes from there is set as text or as a number, never as markup.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const byId = (id) => document.getElementById(id);
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
  const DASH_ARRAYS = ["", "7 4", "2 4", "7 3 2 3", "11 4"];
  const COLOURS = 8;
  const BANDS = 8; // more of them are mud
  const state = { hidden: new Set(), smooth: 0, from: null, to: null };
  const plots = []; // functions that draw a chart anew

  // Elements, texts, numbers

  function el(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "on") for (const [event, listener] of Object.entries(value)) made.addEventListener(event, listener);
      else if (value === true) made.setAttribute(name, "");
      else if (value !== false && value != null) made.setAttribute(name, value);
    }
    made.append(...children.filter((child) => child != null).map((child) => (child instanceof Node ? child : String(child))));
    return made;
  }
  const clear = (node) => node.replaceChildren();
  // plotly reads tags and entities in labels: none of ours are tags
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const number = (value, digits = 5) =>
    value == null ? "–" : Number.isInteger(value) && Math.abs(value) < 1e15 ? value.toLocaleString("en-US")
      : String(Number(value.toPrecision(digits)));
  const share = (value) => (value == null ? "–" : `${(100 * value).toFixed(value > 0 && value < 0.001 ? 3 : 1)} %`);
  const signed = (value) => (value > 0 ? "+" : value < 0 ? "−" : "") + Math.abs(value).toFixed(2);
  function duration(seconds) {
    if (seconds == null) return "–";
    for (const [unit, size] of [["h", 3600], ["min", 60]]) if (seconds >= 2 * size) return `${(seconds / size).toFixed(1)} ${unit}`;
    return `${seconds.toFixed(0)} s`;
  }
  const colour = (run) => `var(--run-${run % COLOURS})`;
  const computed = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const dash = (run) => Math.floor(run / COLOURS) % DASHES.length;
  const label = (run) => data.runs[run].label;
  const indices = (wanted) => data.runs.map((_, r) => r).filter(wanted);

  function svg(tag, attributes, ...children) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }
  function swatch(run) {
    const line = svg("line", { x1: 0, y1: 5, x2: 30, y2: 5, "stroke-dasharray": DASH_ARRAYS[dash(run)] });
    line.style.stroke = colour(run);
    return svg("svg", { class: "swatch", viewBox: "0 0 30 10", "aria-hidden": "true" }, line);
  }
  const named = (run) => [swatch(run), el("span", { class: "name", title: label(run) }, label(run))];

  function table(columns, rows, caption) {
    return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
      el("table", {}, el("thead", {}, el("tr", {}, ...columns.map((c) => el("th", { scope: "col" }, c)))),
        el("tbody", {}, ...rows.map(([head, ...cells]) => el("tr", {}, el("th", { scope: "row" }, ...[head].flat()),
          ...cells.map((cell) => (cell instanceof HTMLTableCellElement ? cell : el("td", {}, cell))))))));
  }
  function select(name, options, value, onchange) {
    const made = el("select", { "aria-label": name, on: { change: () => onchange(Number(made.value)) } },
      ...options.map((text, n) => el("option", { value: n, selected: n === value }, text)));
    return made;
  }
  function check(text, checked, onchange) {
    const box = el("input", { type: "checkbox", checked, "aria-label": text === "log" ? "log scale" : null, on: { change: () => onchange(box.checked) } });
    return el("label", {}, box, text);
  }
  const details = (summary, fill) => {
    const made = el("details", { on: { toggle: () => { if (made.open && made.children.length === 1) made.append(...[fill()].flat()); } } }, el("summary", {}, summary));
    return made;
  };

  // Charts

  const coarse = matchMedia("(pointer: coarse)").matches;
  function axis(title, more = {}) {
    return { title: { text: title, font: { size: 12 }, standoff: 8 }, gridcolor: computed("--grid"), linecolor: computed("--line"), zeroline: false,
      color: computed("--soft"), automargin: true, tickfont: { size: 11 }, fixedrange: coarse, ...more };
  }
  function draw(node, traces, layout) {
    return Plotly.react(node, traces, {
      margin: { l: 48, r: 12, t: 10, b: 38 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
      font: { family: getComputedStyle(document.body).fontFamily, color: computed("--ink"), size: 12 }, hovermode: "closest",
      hoverlabel: { bgcolor: computed("--raised"), bordercolor: computed("--line"), font: { color: computed("--ink"), size: 12 }, namelength: 40 },
      dragmode: coarse ? false : "zoom", ...layout,
    }, { displayModeBar: false, displaylogo: false, responsive: true });
  }
  function figure(title, note, height = "plot") {
    const plot = el("div", { class: height, role: "img", "aria-label": title });
    const caption = el("figcaption", {}, el("h3", {}, title));
    return { plot, caption, node: el("figure", {}, caption, note ? el("p", { class: "note" }, note) : null, plot) };
  }

  // Steps come as differences
  const steps = (differences) => { let at = 0; return differences.map((d) => (at += d)); };
  const read = new Map();
  function curve(run, name) {
    if (!Object.hasOwn(data.series[run], name)) return null;
    const key = `${run}/${name}`, found = data.series[run][name];
    if (!read.has(key)) read.set(key, { x: steps(found.x), y: found.y, mx: found.mx ? steps(found.mx) : null, my: found.my, table: found.table });
    return read.get(key);
  }
  // Mean over a window of steps, centred; of a down-sampled curve over its buckets' exact means
  function smoothed(one, window) {
    const x = one.mx ?? one.x, y = one.my ?? one.y, out = [];
    let low = 0, high = 0, sum = 0, count = 0;
    for (let i = 0; i < x.length; i++) {
      while (high < x.length && x[high] <= x[i] + window / 2) { if (y[high] != null) { sum += y[high]; count++; } high++; }
      while (x[low] < x[i] - window / 2) { if (y[low] != null) { sum -= y[low]; count--; } low++; }
      out.push(count ? sum / count : null);
    }
    return { x, y: out };
  }
  // A point between two gaps has no line: it gets a dot
  const dots = (y) => y.map((value, i) => (value != null && y[i - 1] == null && y[i + 1] == null ? 5 : 0));

  function lineTraces(name) {
    const traces = [];
    data.runs.forEach((run, r) => {
      const one = curve(r, name);
      if (!one || state.hidden.has(r)) return;
      const line = { color: computed(`--run-${r % COLOURS}`), dash: DASHES[dash(r)], width: 1.6 };
      const few = one.y.length <= 40;
      const base = { type: "scatter", name: plain(run.label), hovertemplate: "step %{x:,}<br>%{y:.5~g}<extra>%{fullData.name}</extra>" };
      const sizes = few ? one.y.map(() => 4) : dots(one.y);
      traces.push({ ...base, x: one.x, y: one.y, line, mode: sizes.some((size) => size) ? "lines+markers" : "lines",
        marker: { size: sizes, color: line.color, line: { width: 0 } }, opacity: state.smooth ? 0.22 : 1, hoverinfo: state.smooth ? "skip" : undefined,
        ...(state.smooth ? { hovertemplate: undefined } : {}) });
      if (state.smooth) traces.push({ ...base, ...smoothed(one, (state.smooth / 100) * run.steps), line: { ...line, width: 2 }, mode: "lines" });
    });
    return traces;
  }
  function curveTable(name) {
    const at = (pair) => (pair ? [el("td", {}, number(pair[1], 6)), el("td", {}, number(pair[0]))] : [el("td", {}, "–"), el("td", {}, "–")]);
    const rows = data.runs.map((run, r) => [r, curve(r, name)]).filter(([, one]) => one).map(([r, { table: t }]) =>
      [named(r), number(t.count), number(t.gaps), ...at(t.first), ...at(t.last), ...at(t.lowest), ...at(t.highest)]);
    return table(["run", "values", "null", "first", "step", "last", "step", "lowest", "step", "highest", "step"], rows, name);
  }
  const WORDS = [
    ["data/reward/", "mean reward, "], ["data/pass_rate/", "share with reward 1, "], ["log_ratio/", "log-ratio, "],
    ["entropy/", "entropy, "], ["rectified_fraction/", "rectified, "], ["kl_ref_to_model", "KL(π_ref ‖ π), self samples"], ["grad_norm", "gradient norm"], ["rectified_fraction", "rectified, all sources"],
    ["clipped_fraction", "clipped, all sources"], ["stale_fraction", "stale share"], ["tokens_per_second", "tokens a second"],
    ["data/groups_with_signal", "groups with a signal"], ["entropy", "entropy, all sources"],
  ];
  function words(name) {
    for (const [start, text] of WORDS) if (name.startsWith(start)) return text + name.slice(start.length);
    return name;
  }

  function trainingChart({ title, note, metrics }) {
    let metric = 0, logarithmic = false;
    const { plot, caption, node } = figure(title, note);
    const more = details("Values as a table", () => curveTable(metrics[metric]));
    const redraw = () => {
      const traces = lineTraces(metrics[metric]);
      plot.setAttribute("aria-label", `${title}: ${words(metrics[metric])} over steps, a line for each of ${new Set(traces.map((t) => t.name)).size} runs; the table below has the values`);
      draw(plot, traces, {
        xaxis: axis("step", { range: state.from == null && state.to == null ? undefined : [state.from ?? 0, state.to ?? Math.max(...data.runs.map((r) => r.steps))] }),
        yaxis: axis(plain(words(metrics[metric])), { type: logarithmic ? "log" : "linear" }),
      });
    };
    if (metrics.length > 1) {
      caption.append(select(`${title}: which metric`, metrics.map(words), 0, (value) => {
        metric = value;
        while (more.children.length > 1) more.lastChild.remove();
        if (more.open) more.append(curveTable(metrics[metric]));
        redraw();
      }));
    }
    const log = check("log", false, (on) => { logarithmic = on; redraw(); });
    if (metrics.length === 1) log.style.marginLeft = "auto";
    caption.append(log);
    node.append(more);
    plots.push(redraw);
    return node;
  }

  // Sections

  const add = (section, ...nodes) => byId(section).append(...nodes.filter((node) => node != null));
  function empty(section, text) { byId(section).append(el("p", { class: "quiet" }, text)); }

  function runsSection() {
    const short = (value) => (value == null ? "–" : value.length > 60 ? el("span", { title: value }, `${value.slice(0, 60)}…`) : value);
    const rows = data.runs.map((run, r) => [named(r), run.steps ? number(run.steps) : "–", run.steps ? (run.finished ? "yes" : "no") : "not trained here",
      duration(run.seconds), number(run.tokens), ...run.settings.map((value) => el("td", { class: "text" }, short(value)))]);
    byId("runs").append(
      el("p", {}, data.runs.length > 1 ? "With the settings in which they differ." : "One run: there is nothing to compare it with."),
      table(["run", "steps", "finished", "training time", "tokens computed", ...data.differing], rows, "Runs and their settings"));
    const shared = Object.entries(data.shared);
    const list = (entries) => el("dl", {}, ...entries.flatMap(([key, value]) => [el("dt", {}, key), el("dd", {}, value)]));
    if (shared.length) byId("runs").append(details(`${shared.length} settings that ${data.runs.length > 1 ? "all trained runs share" : "it was trained with"}`, () => list(shared)));
    byId("runs").append(details("Folders", () => list(data.runs.map((run) => [run.label, run.folder]))));
  }

  function estimate(found, best) {
    if (found?.value == null) return el("td", {}, "–");
    const cell = el("td", { class: best ? "best" : "" }, found.value.toFixed(3));
    if (best) cell.append(el("span", { class: "hidden-text" }, " (best)"));
    if (found.low != null) cell.append(el("span", { class: "interval" }, `${found.low.toFixed(3)}–${found.high.toFixed(3)}`));
    return cell;
  }
  function bestOf(values) {
    const found = values.filter((value) => value != null);
    return found.length > 1 ? Math.max(...found) : null;
  }
  function comparisonSection() {
    if (!data.benchmarks.length) return empty("comparison", "None of these runs has results: gft eval writes them.");
    byId("comparison").append(el("p", {}, "Means over prompts; small numbers are 95 % bootstrap intervals over prompts. ▲ marks the highest of a column, which an interval may not tell from the next. Entropy and KL(model ‖ reference) are in nats a token."));
    if (data.benchmarks.length > 1) {
      const tops = data.benchmarks.map((b) => bestOf(b.results.map((r) => r?.pass_at[1]?.value)));
      const rows = data.runs.map((run, r) => [named(r), ...data.benchmarks.map((b, n) => { const v = b.results[r]?.pass_at[1]; return estimate(v, v && v.value === tops[n]); })]);
      byId("comparison").append(el("p", { class: "caption" }, "pass@1 on every benchmark"), table(["run", ...data.benchmarks.map((b) => b.name)], rows, "pass@1 on every benchmark"));
    }
    for (const b of data.benchmarks) {
      const columns = [...b.ks.map((k) => [`pass@${k}`, (r) => r.pass_at[k]]), ["greedy", (r) => r.greedy], ["mean reward", (r) => r.mean_reward]];
      const tops = columns.map(([, of]) => bestOf(b.results.map((r) => r && of(r)?.value)));
      const rows = data.runs.flatMap((run, r) => {
        const found = b.results[r];
        if (!found) return [[named(r), ...Array(columns.length + 6).fill("–")]];
        return [[named(r), ...columns.map(([, of], n) => { const v = of(found); return estimate(v, v && v.value === tops[n]); }),
          number(found.entropy, 4), number(found.kl, 4), number(found.mean_tokens, 4), share(found.truncated_samples / (found.prompts * found.samples_per_prompt)),
          number(found.unjudged_samples), `${number(found.prompts)} × ${number(found.samples_per_prompt)}`]];
      });
      byId("comparison").append(el("p", { class: "caption" }, b.name),
        table(["run", ...columns.map(([name]) => name), "entropy", "KL", "tokens", "cut off", "unjudged", "prompts × samples"], rows, b.name));
      if (b.differing.length) byId("comparison").append(el("p", { class: "note" }, `Not measured alike: these settings differ between runs: ${b.differing.join(", ")}.`));
    }
  }

  function passSection() {
    const shown = data.benchmarks.filter((b) => b.ks.length > 1);
    if (!shown.length) return empty("passk", "No result has pass@k for more than one k.");
    let which = 0;
    const { plot, caption, node } = figure("pass@k over k", `Bands are 95 % bootstrap intervals over prompts, drawn for up to ${BANDS} runs at once.`, "plot wide");
    if (shown.length > 1) caption.append(select("Benchmark", shown.map((b) => b.name), 0, (value) => { which = value; redraw(); }));
    function redraw() {
      const b = shown[which], traces = [];
      const few = b.results.filter((found, r) => found && !state.hidden.has(r)).length <= BANDS;
      plot.setAttribute("aria-label", `pass@k over k on ${b.name}; the table of results has the values`);
      b.results.forEach((found, r) => {
        if (!found || state.hidden.has(r)) return;
        const ks = b.ks.filter((k) => found.pass_at[k]), at = ks.map((k) => found.pass_at[k]), of = computed(`--run-${r % COLOURS}`);
        if (few && at.every((e) => e.low != null)) {
          traces.push({ type: "scatter", x: [...ks, ...[...ks].reverse()], y: [...at.map((e) => e.high), ...at.map((e) => e.low).reverse()], fill: "toself",
            fillcolor: of, opacity: 0.13, line: { width: 0 }, mode: "lines", hoverinfo: "skip" });
        }
        traces.push({ type: "scatter", name: plain(label(r)), x: ks, y: at.map((e) => e.value), customdata: at.map((e) => (e.low == null ? "" : `${e.low.toFixed(3)} to ${e.high.toFixed(3)}`)),
          mode: "lines+markers", line: { color: of, dash: DASHES[dash(r)], width: 2 }, marker: { size: 6, color: of },
          hovertemplate: "k = %{x}<br>%{y:.3f}<br>%{customdata}<extra>%{fullData.name}</extra>" });
      });
      draw(plot, traces, { xaxis: axis("k", { type: "log", tickvals: b.ks, ticktext: b.ks.map(String) }), yaxis: axis("pass@k", { tickformat: ".2f" }) });
    }
    plots.push(redraw);
    byId("passk").append(legend(indices((r) => shown.some((b) => b.results[r]))), node);
  }

  // One set of checkboxes for all charts; each section with charts has its own copy of it
  const legends = [];
  function legend(runs) {
    const boxes = runs.map((r) => {
      const box = el("input", { type: "checkbox", checked: true, on: { change: () => { box.checked ? state.hidden.delete(r) : state.hidden.add(r); changed(); } } });
      return { r, box, node: el("label", { class: "chip" }, box, ...named(r)) };
    });
    legends.push(() => boxes.forEach(({ r, box }) => { box.checked = !state.hidden.has(r); }));
    const all = (hide) => () => { runs.forEach((r) => (hide ? state.hidden.add(r) : state.hidden.delete(r))); changed(); };
    const buttons = runs.length > 2 ? [el("button", { type: "button", on: { click: all(false) } }, "all"), el("button", { type: "button", on: { click: all(true) } }, "none")] : [];
    return el("fieldset", { class: "chips" }, el("legend", { class: "hidden-text" }, "Runs shown in the charts"), el("div", { class: "row" }, ...boxes.map((b) => b.node), ...buttons));
  }
  function changed() { legends.forEach((refresh) => refresh()); redrawAll(); }

  function curvesSection() {
    if (!data.charts.length) return empty("curves", "None of these folders has steps of a training run.");
    const smooth = select("Smoothing", ["raw", "mean over 1 % of the steps", "mean over 3 %", "mean over 10 %"], 0, (value) => { state.smooth = [0, 1, 3, 10][value]; redrawAll(); });
    const bound = (name, key) => {
      const input = el("input", { type: "number", min: 0, step: 1, "aria-label": name, placeholder: key, on: { change: () => { state[key] = input.value === "" ? null : Number(input.value); redrawAll(); } } });
      return input;
    };
    const cut = data.points ? `Long curves are down-sampled to at most ${number(data.points)} points (${number(Math.max(8, Math.floor(data.points / 4)))} under “Other metrics”): of each stretch of steps the lowest and the highest value are kept, at their own steps, and every stretch with a null has its gap, so no spike is hidden. Smoothing uses the exact means of the stretches, and the tables all values.`
      : "Every step of every curve is drawn.";
    byId("curves").append(el("p", {}, cut, " A gap is a value that was reported as null.", coarse ? "" : " Drag over a chart to zoom in, double-click to zoom out."),
      el("div", { class: "controls" }, legend(indices((r) => data.runs[r].steps)), el("div", { class: "row" }, el("label", {}, "Smoothing", smooth), el("label", {}, "Steps", bound("First step shown", "from"), "to", bound("Last step shown", "to")))),
      el("div", { class: "charts" }, ...data.charts.map(trainingChart)));
  }

  function weightsSection() {
    const runs = indices((r) => data.weights[r]);
    if (!runs.length) return empty("weights", "None of these runs rectifies: there are no histograms of weights.");
    let run = runs.includes(data.preferred) ? data.preferred : runs[0], place = 0, logarithmic = true;
    const { plot, caption, node } = figure("Share of tokens by weight", null, "plot wide");
    const slider = el("input", { type: "range", min: 0, value: 0, step: 1, "aria-label": "Part of the training", on: { input: () => { place = Number(slider.value); redraw(); } } });
    const told = el("output", {});
    const more = details("Values as a table", () => rows());
    const part = (rows) => (place ? rows[place - 1] : rows[0].map((_, bin) => rows.reduce((sum, row) => sum + row[bin], 0)));
    const power = (n) => (n >= 10 ? `${2 ** (n - 10)}k` : `${2 ** n}`);
    const name = (bin, of) => (bin === of - 1 ? `≥ ${power(bin)}` : `${power(bin)}–${power(bin + 1)}`);
    function redraw() {
      const w = data.weights[run], before = part(w.before), after = part(w.after), total = before.reduce((a, b) => a + b, 0) || 1;
      slider.max = w.steps.length;
      const first = place > 1 ? w.steps[place - 2] + 1 : 1;
      const where = place ? (first === w.steps[place - 1] ? `step ${number(first)}` : `steps ${number(first)} to ${number(w.steps[place - 1])}`) : "all steps";
      told.textContent = `${where}, ${number(total === 1 ? before.reduce((a, b) => a + b, 0) : total)} tokens`;
      slider.setAttribute("aria-valuetext", where);
      const bins = before.map((_, bin) => name(bin, before.length));
      const bars = (counts, title, of) => ({ type: "bar", name: title, x: bins, y: counts.map((n) => n / total), customdata: counts.map((n) => number(n)), marker: { color: of },
        hovertemplate: "weight %{x}<br>%{y:.4%}: %{customdata} tokens<extra>%{fullData.name}</extra>" });
      plot.setAttribute("aria-label", `Share of tokens by weight before and after rectification, ${label(run)}, ${where}; the table below has the values`);
      draw(plot, [bars(before, "before: 1/π", computed("--run-1")), bars(after, "after: C/π", computed("--run-0"))], {
        barmode: "group", bargap: 0.25, showlegend: true, legend: { orientation: "h", x: 1, xanchor: "right", y: 1.12, font: { size: 12 }, itemclick: false, itemdoubleclick: false },
        xaxis: axis("weight of a token (k = 1,024)", { type: "category", tickangle: "auto" }),
        yaxis: axis("share of tokens", { type: logarithmic ? "log" : "linear", tickformat: "~%", ...(logarithmic ? { dtick: 1 } : {}) }),
      });
      if (more.open) { while (more.children.length > 1) more.lastChild.remove(); more.append(rows()); }
    }
    const rows = () => { const w = data.weights[run], before = part(w.before), after = part(w.after); return table(["weight", "before: 1/π, tokens", "after: C/π, tokens"], before.map((n, bin) => [name(bin, before.length), number(n), number(after[bin])]), "Weights"); };
    if (runs.length > 1) caption.append(select("Run", runs.map(label), runs.indexOf(run), (value) => { run = runs[value]; place = 0; slider.value = 0; redraw(); }));
    caption.append(check("log", true, (on) => { logarithmic = on; redraw(); }));
    byId("weights").append(el("p", {}, "Written as a policy gradient, supervised fine-tuning gives every token the weight 1/π, which has no bound; rectification multiplies it by C(π), which bounds it by 1/τ. Counted over the tokens that went through the model."),
      node, el("div", { class: "row" }, el("label", {}, "All steps, or a part of the training", slider), told), more);
    plots.push(redraw);
  }

  // The groups

  function decode(base64, Kind) {
    const text = atob(base64), bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    return new Kind(bytes.buffer);
  }
  // Dynamic Coefficient Rectification: gfttrain/objective.py, rectified_coefficient
  const coefficient = (logprob, tau) => { const p = Math.exp(logprob); return p < tau ? p : 1; };

  const ENDS = new Map([["stop", "ended by itself"], ["length", "cut by the length limit"], ["given", "given text"]]);

  function groupsSection() {
    if (!data.views.length || !data.examples.some((one) => one.groups.length)) return empty("groups", "There are no groups to show.");
    const views = data.views.filter((v) => data.examples[v.data].groups.length);
    let view = Math.max(0, views.findIndex((v) => v.run === data.preferred)), group = 0, shading = 0;
    const body = el("div", {}), inspector = el("div", { class: "inspector", id: "inspector", "aria-live": "polite", hidden: true });
    const counter = el("output", {});
    const kinds = () => [["C(π_ref), at the start", "start"], ...(views[view].logprobs ? [["C(π), trained", "trained"]] : []), ["log π_ref", "reference"], ...(views[view].logprobs ? [["log π, trained", "now"]] : [])];
    const runPicker = select("Run", views.map((v) => label(v.run)), view, (value) => { const d = views[view].data; view = value; if (views[view].data !== d) group = 0; shading = Math.min(shading, kinds().length - 1); render(); });
    const shades = el("fieldset", {});
    const turn = (by) => () => { const count = data.examples[views[view].data].groups.length; group = (group + by + count) % count; render(); };
    const hint = "Point at a token, tap it, or go to a response with Tab and through its tokens with the arrow keys.";
    const tell = (...parts) => { inspector.hidden = false; inspector.replaceChildren(...parts.filter((part) => part != null)); };
    const fact = (name, value) => el("span", {}, `${name} `, el("b", {}, value));

    function render() {
      const v = views[view], examples = data.examples[v.data], g = examples.groups[group];
      counter.textContent = `Group ${group + 1} of ${examples.groups.length}`;
      clear(shades);
      shades.append(el("legend", { class: "hidden-text" }, "Shade tokens by"), el("div", { class: "row" }, el("span", { class: "quiet" }, "Shade by"), ...kinds().map(([text], n) => {
        const radio = el("input", { type: "radio", name: "shading", value: n, checked: n === shading, on: { change: () => { shading = n; render(); shades.querySelectorAll("input")[n].focus(); } } });
        return el("label", {}, radio, text);
      })));
      const kind = kinds()[shading][1], byLogprob = kind === "reference" || kind === "now";
      byId("groups").classList.toggle("by-logprob", byLogprob);
      const [low, high] = byLogprob ? ["0 nats", "−8 and less"] : ["C = 1: as it is", "C = 0: held back"];
      const scale = el("span", { class: "scale" }, low, el("i", {}), high);
      clear(body);
      inspector.hidden = true;
      body.append(el("div", { class: "row" }, scale, el("span", { class: "note" }, hint)), el("p", { class: "note" }, `${g.place}${g.source ? `, from ${g.source}` : ""}${g.truth == null ? "" : `; ground truth: ${g.truth}`}`),
        el("div", { class: "prompt", tabindex: 0, role: "region", "aria-label": "Prompt" }, ...g.prompt.flatMap(([role, text]) => [el("b", {}, role), text])),
        ...g.responses.map((response, k) => responseCard(v, examples, g, response, k, kind)));
    }

    function responseCard(v, examples, g, response, k, kind) {
      const ids = decode(response.ids, Int32Array), ref = decode(response.ref, Float32Array);
      const own = v.logprobs ? decode(v.logprobs[group][k], Float32Array) : null;
      const advantage = v.advantages[group][k], used = v.used[group][k];
      const values = kind === "start" || kind === "reference" ? ref : own;
      const held = v.rectifies && values ? [...values].filter((logprob) => coefficient(logprob, v.tau) < 1).length / values.length : null;
      const largest = Math.max(1, ...v.advantages[group].map(Math.abs));
      const bar = el("i", {});
      bar.style.width = `${(50 * Math.abs(advantage)) / largest}%`;
      const header = el("header", {}, el("b", {}, response.source),
        el("span", {}, "reward ", el("b", {}, response.reward == null ? response.status : number(response.reward, 4))),
        used ? el("span", {}, "advantage ", el("b", { class: advantage > 0 ? "up" : advantage < 0 ? "down" : "" }, signed(advantage)), " ", el("span", { class: advantage < 0 ? "meter minus" : "meter", "aria-hidden": "true" }, bar))
          : el("span", { class: "quiet" }, "not used by this run's objective"),
        held == null ? null : el("span", {}, `held back (C < 1${kind === "trained" || kind === "now" ? ", trained" : ""}) `, el("b", { class: "share-held" }, share(held)), ids.length < response.tokens ? " of the tokens shown" : " of tokens"),
        el("span", { class: "quiet" }, `${number(response.tokens)} tokens, ${ENDS.get(response.finish) ?? response.finish}`));
      const tokens = el("div", { class: "tokens", role: "group", "aria-label": `Tokens of response ${k + 1}, ${response.source}. Arrow keys go from token to token.` });
      const show = (t) => {
        const logprob = ref[t], text = examples.texts[ids[t]];
        tell(el("span", {}, el("code", {}, text === undefined ? "no text" : text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣"))), fact("id", ids[t]), fact("log π_ref", logprob.toFixed(4)), fact("π_ref", number(Math.exp(logprob), 4)),
          v.rectifies ? fact("C(π_ref)", number(coefficient(logprob, v.tau), 4)) : null,
          ...(own ? [fact("log π", own[t].toFixed(4)), fact("π", number(Math.exp(own[t]), 4)), v.rectifies ? fact("C(π)", number(coefficient(own[t], v.tau), 4)) : null] : []),
          fact("advantage", signed(advantage)), fact("token", `${number(t + 1)} of ${number(response.tokens)}`));
      };
      const piece = document.createDocumentFragment();
      ids.forEach((id, t) => {
        const text = examples.texts[id] ?? `<${id}>`;
        const span = el("span", { class: "t", tabindex: t ? -1 : 0 }, text.replace(/\n/g, "⏎\n").replace(/\t/g, "⇥\t"));
        const dark = !values ? 0 : kind === "reference" || kind === "now" ? Math.min(1, -values[t] / 8) : v.rectifies ? 1 - coefficient(values[t], v.tau) : 0;
        if (dark > 0) span.style.setProperty("--a", (0.08 + 0.6 * dark).toFixed(3));
        span.dataset.t = t;
        piece.append(span);
      });
      tokens.append(piece);
      if (ids.length < response.tokens) tokens.append(el("span", { class: "end" }, ` … ${number(response.tokens - ids.length)} more tokens are not in this page`));
      let now = null;
      const go = (span, focus) => {
        if (!span || !span.dataset.t) return;
        body.querySelectorAll(".t.now").forEach((other) => other.classList.remove("now"));
        if (now) now.tabIndex = -1; else tokens.firstChild.tabIndex = -1;
        now = span; now.tabIndex = 0; now.classList.add("now");
        if (focus) now.focus();
        show(Number(span.dataset.t));
      };
      tokens.addEventListener("pointerover", (event) => { if (event.target.dataset.t) show(Number(event.target.dataset.t)); });
      tokens.addEventListener("click", (event) => go(event.target, true));
      tokens.addEventListener("focusin", (event) => go(event.target, false));
      tokens.addEventListener("keydown", (event) => {
        const at = Number(event.target.dataset.t), next = { ArrowRight: at + 1, ArrowDown: at + 10, ArrowLeft: at - 1, ArrowUp: at - 10, Home: 0, End: ids.length - 1 }[event.key];
        if (next === undefined || Number.isNaN(at) || event.ctrlKey || event.metaKey || event.altKey) return;
        event.preventDefault();
        go(tokens.children[Math.min(ids.length - 1, Math.max(0, next))], true);
      });
      return el("article", { class: "response" }, header, tokens);
    }

    const clipped = views.filter((v) => !v.rectifies).map((v) => label(v.run));
    add("groups",
      el("p", {}, "Each response with its advantage A, the same for all its tokens, and each token shaded by its coefficient C(π): the part of A that reaches the token. C = π where π < τ, else 1. At the start of training π is π_ref, so the coefficients “at the start” come from the stored log-probs and are those of the first step, to the noise floor. The trained model's are there where the report was made with --score."),
      clipped.length ? el("p", { class: "note" }, `No coefficients for ${clipped.join(", ")}: the objective clips a ratio in place of C, which is 1 at the start.`) : null,
      el("p", { class: "note" }, `The same groups for all runs on the same data: spread over it, first those with right and wrong answers. Of a long response the first ${number(data.shown_tokens)} tokens are here.`),
      el("div", { class: "row" }, views.length > 1 ? el("label", {}, "As weighed in", runPicker) : el("span", {}, `As weighed in ${label(views[0].run)}`),
        el("button", { type: "button", on: { click: turn(-1) } }, "← previous"), counter, el("button", { type: "button", on: { click: turn(1) } }, "next →"), shades),
      el("div", {}, body, inspector));
    render();
  }

  // The whole

  function redrawAll() { plots.forEach((plot) => plot()); }
  function themeButton() {
    const choices = ["system", "light", "dark"];
    let choice = 0;
    const button = byId("theme");
    const apply = () => {
      if (choice) root.dataset.theme = choices[choice]; else delete root.dataset.theme;
      button.textContent = `Colours: ${choices[choice]}`;
      button.setAttribute("aria-label", `Colours: ${choices[choice]}. Press to change.`);
      redrawAll();
    };
    button.addEventListener("click", () => { choice = (choice + 1) % choices.length; apply(); });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawAll);
  }

  byId("made").textContent = `${data.runs.length} ${data.runs.length === 1 ? "run" : "runs"}, made ${data.made} by gft-toolkit ${data.toolkit}`;
  document.querySelectorAll("main section:not([hidden]) > h2").forEach((h) => byId("nav").append(el("a", { href: `#${h.parentElement.id}` }, h.textContent)));
  if (data.missing.length) {
    byId("missing").hidden = false;
    byId("missing-list").append(...data.missing.map((text) => el("li", {}, text)));
  }
  runsSection();
  comparisonSection();
  passSection();
  curvesSection();
  weightsSection();
  groupsSection();
  themeButton();
  byId("foot").textContent = "One file: nothing is loaded from elsewhere. Charts by plotly.js (MIT licence).";
  // one chart after the other, so that the page can be read at once
  const waiting = [...plots];
  (function next() {
    const plot = waiting.shift();
    if (!plot) { root.dataset.ready = "true"; return; }
    plot();
    setTimeout(next, 0);
  })();
})();
