"use strict";
// All text of the page's data is put into the page by textContent, so that none of it is read as HTML.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const AXES = ["optimizer steps", "rollouts", "time of fitting"];
  const COLOURS = 8;
  const DASHES = ["", "8 4", "8 3 2 3", "4 2"];

  function element(tag, text, className) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  function drawn(parent, tag, attributes, text) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  }

  function short(value) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e6 || size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
    return String(Number(value.toPrecision(4)));
  }

  function clock(seconds) {
    const two = (value) => String(Math.floor(value)).padStart(2, "0");
    const hours = Math.floor(seconds / 3600), minutes = Math.floor(seconds / 60) % 60;
    return (hours ? hours + ":" + two(minutes) : minutes) + ":" + two(seconds % 60);
  }

  function along(value) {
    return view.axis === 2 ? clock(value) : short(value);
  }

  // Round numbers between two values, about as many as asked for.
  function ticks(low, high, count, units) {
    const rough = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = (units ? units.find((each) => each >= rough) : 0) || power * [1, 2, 5, 10].find((each) => each * power >= rough);
    const found = [];
    for (let each = Math.ceil(low / step - 1e-9); each * step <= high + step * 1e-9; each++) found.push(each * step);
    return found;
  }

  // What is shown: which runs, over what, and whether runs of other seeds are one.
  const view = { axis: 0, hidden: new Set(), mean: false };

  function colour(index) {
    return "var(--series-" + (index % COLOURS) + ")";
  }

  function between(xs, ys, x) {
    const next = xs.findIndex((each) => each >= x);
    if (next < 0 || x < xs[0]) return null;
    if (xs[next] === x) return ys[next];
    return ys[next - 1] + ((x - xs[next - 1]) / (xs[next] - xs[next - 1])) * (ys[next] - ys[next - 1]);
  }

  // Lines as they are drawn. Runs that differ in their seed alone may be one: their mean, and from the lowest to the highest.
  function lines(plot) {
    const labels = [...new Set(plot.series.map((each) => each.label))];
    const shown = plot.series.filter((each) => !view.hidden.has(each.run)).map((each) => {
      const sort = labels.indexOf(each.label), several = data.runs.length > 1;
      const range = each.errors.map((error, index) => [each.y[index] - error, each.y[index] + error]);
      const name = [several ? data.runs[each.run] : "", each.label].filter(Boolean).join(", ");
      return {
        ...each, x: data.points[each.x].map((point) => point[view.axis]), range, name,
        colour: colour(several ? each.run : sort), dash: several ? DASHES[sort % DASHES.length] : "",
      };
    });
    if (!view.mean) return shown;
    const merged = new Map();
    for (const each of shown) {
      const alike = data.seeds[each.run];
      const key = (alike.length ? "seeds " + alike[0] : each.run) + " " + each.label;
      merged.set(key, [...(merged.get(key) || []), each]);
    }
    return [...merged.values()].map((group) => {
      if (group.length === 1) return group[0];
      const found = { ...group[0], x: [], y: [], errors: [], range: [], base: null };
      found.name = ["mean of " + group.length + " seeds", found.label].filter(Boolean).join(", ");
      for (const x of group[0].x) {
        const values = group.map((each) => between(each.x, each.y, x));
        if (values.includes(null)) continue;
        found.x.push(x);
        found.y.push(values.reduce((sum, each) => sum + each, 0) / values.length);
        found.range.push([Math.min(...values), Math.max(...values)]);
      }
      const bases = group.map((each) => each.base).filter((each) => each !== null);
      if (bases.length) found.base = bases.reduce((sum, each) => sum + each, 0) / bases.length;
      return found;
    }).filter((each) => each.x.length);
  }

  function draw(figure, plot) {
    const area = figure.querySelector(".plot"), output = figure.querySelector("output");
    area.replaceChildren();
    output.textContent = "";
    const found = lines(plot);
    if (!found.length) {
      area.append(element("p", "All runs are hidden.", "soft"));
      return;
    }
    const width = Math.max(area.clientWidth, 240), height = Math.round(Math.min(Math.max(0.5 * width, 170), 300));
    const svg = drawn(area, "svg", { viewBox: "0 0 " + width + " " + height, tabindex: 0, role: "img" });
    svg.setAttribute("aria-label", plot.name + ". Arrow keys read its values.");
    const xs = found.flatMap((each) => each.x), stops = [...new Set(xs)].sort((a, b) => a - b);
    const ys = found.flatMap((each) => [...each.y, ...each.range.flat(), ...(each.base === null ? [] : [each.base])]);
    let [left, right, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    // From zero where that is near, and not beyond what a share can be.
    if (low > 0 && low < 0.35 * high) low = 0;
    if (left > 0 && left < 0.35 * right) left = 0;
    const room = 0.04 * (high - low || Math.abs(high) || 1);
    low -= low === 0 ? 0 : low >= 0 && low < room ? low : room;
    high = high <= 1 && high + room > 1 ? 1 : high + room;
    if (left === right) { left -= 1; right += 1; }
    // As many as four digits tell apart.
    const choices = [5, 3, 2, 1].map((count) => ticks(low, high, count));
    const marks = choices.find((each) => each.every((y) => Math.abs(Number(short(y)) - y) < 1e-3 * (high - low))) || choices[3];
    const margin = { left: 8 + 7 * Math.max(...marks.map((each) => short(each).length)), right: 14, top: 8, bottom: 36 };
    const across = (x) => margin.left + ((x - left) / (right - left)) * (width - margin.left - margin.right);
    const up = (y) => height - margin.bottom - ((y - low) / (high - low)) * (height - margin.top - margin.bottom);
    const place = (each) => each.toFixed(1);
    for (const y of marks) {
      drawn(svg, "path", { class: "grid", d: "M" + margin.left + " " + place(up(y)) + "H" + (width - margin.right) });
      drawn(svg, "text", { x: margin.left - 5, y: place(up(y) + 4), "text-anchor": "end" }, short(y));
    }
    const units = view.axis === 2 ? [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400] : null;
    for (const x of ticks(left, right, Math.max(2, Math.floor(width / 90)), units)) {
      drawn(svg, "path", { class: "grid", d: "M" + place(across(x)) + " " + (height - margin.bottom) + "v4" });
      drawn(svg, "text", { x: place(across(x)), y: height - margin.bottom + 16, "text-anchor": "middle" }, along(x));
    }
    drawn(svg, "text", { x: width - margin.right, y: height - 4, "text-anchor": "end" }, AXES[view.axis]);
    for (const each of found) {
      if (each.range.length) {
        const edge = (side) => each.x.map((x, index) => place(across(x)) + " " + place(up(each.range[index][side])));
        drawn(svg, "path", { class: "band", fill: each.colour, d: "M" + edge(0).join("L") + "L" + edge(1).reverse().join("L") + "Z" });
      }
      if (each.base !== null) {
        const d = "M" + margin.left + " " + place(up(each.base)) + "H" + (width - margin.right);
        drawn(svg, "path", { class: "base", stroke: each.colour, d });
      }
      const points = each.x.map((x, index) => place(across(x)) + " " + place(up(each.y[index])));
      drawn(svg, "path", { class: "line", stroke: each.colour, "stroke-dasharray": each.dash, d: "M" + points.join("L") });
      if (each.x.length > 40) continue;
      each.x.forEach((x, index) => drawn(svg, "circle", { cx: place(across(x)), cy: place(up(each.y[index])), r: 2, fill: each.colour }));
    }
    // A legend of its own where it has lines that the page's legend does not tell apart.
    if (found.some((each) => each.label || found.length > data.runs.length) || view.mean) {
      const legend = element("p", undefined, "legend");
      for (const each of found) {
        const entry = element("span");
        const key = drawn(entry, "svg", { viewBox: "0 0 22 8", width: 22, height: 8, "aria-hidden": "true" });
        drawn(key, "path", { class: "line", stroke: each.colour, "stroke-dasharray": each.dash, d: "M0 4H22" });
        entry.append(" " + each.name);
        legend.append(entry);
      }
      if (found.some((each) => each.base !== null)) legend.append(element("span", "dotted: the base"));
      area.prepend(legend);
    }
    const cursor = drawn(svg, "path", { class: "cursor", d: "" });
    let at = -1;
    function read(index) {
      at = Math.min(Math.max(index, 0), stops.length - 1);
      const x = stops[at];
      cursor.setAttribute("d", "M" + place(across(x)) + " " + margin.top + "V" + (height - margin.bottom));
      const said = found.map((each) => {
        let best = 0;
        each.x.forEach((own, place) => { if (Math.abs(own - x) < Math.abs(each.x[best] - x)) best = place; });
        const error = each.errors.length ? " ± " + short(each.errors[best]) : "";
        return [each.name, short(each.y[best]) + error].filter(Boolean).join(" ");
      });
      output.textContent = AXES[view.axis] + " " + along(x) + ": " + said.join("; ");
    }
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = left + (((event.clientX - box.left) / box.width) * width - margin.left) * ((right - left) / (width - margin.left - margin.right));
      let best = 0;
      stops.forEach((each, index) => { if (Math.abs(each - x) < Math.abs(stops[best] - x)) best = index; });
      read(best);
    });
    svg.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!by) return;
      event.preventDefault();
      read(at + by);
    });
    svg.addEventListener("pointerleave", () => { cursor.setAttribute("d", ""); output.textContent = ""; });
  }

  const figures = [...document.querySelectorAll("figure[data-plot]")];

  function drawAll() {
    for (const figure of figures) draw(figure, data.plots[Number(figure.dataset.plot)]);
  }

  // One legend for all plots.
  function toggle(text, pressed, act, key) {
    const made = element("button", undefined, "toggle");
    made.type = "button";
    if (key !== undefined) {
      const box = element("span", undefined, "key");
      box.style.background = key;
      made.append(box);
    }
    made.append(text);
    made.setAttribute("aria-pressed", String(pressed));
    made.addEventListener("click", () => { act(made); drawAll(); });
    byId("controls").append(made);
    return made;
  }

  if (figures.length) {
    if (data.runs.length > 1) {
      data.runs.forEach((name, index) => toggle(name, true, (button) => {
        if (!view.hidden.delete(index)) view.hidden.add(index);
        button.setAttribute("aria-pressed", String(!view.hidden.has(index)));
      }, colour(index)));
    }
    if (data.seeds.some((each) => each.length)) {
      toggle("seeds as mean and range", false, (button) => {
        view.mean = !view.mean;
        button.setAttribute("aria-pressed", String(view.mean));
      });
    }
    const label = element("label", "over "), choice = element("select");
    choice.id = "axis";
    AXES.forEach((name, index) => {
      const option = element("option", name);
      option.value = index;
      choice.append(option);
    });
    choice.value = view.axis;
    choice.addEventListener("change", () => { view.axis = Number(choice.value); drawAll(); });
    label.append(choice);
    byId("controls").append(label);
    drawAll();
    let width = window.innerWidth;
    window.addEventListener("resize", () => {
      if (window.innerWidth !== width) drawAll();
      width = window.innerWidth;
    });
  }

  // A run that goes on writes its page anew. Nobody is disturbed who reads: only a page that is left alone is renewed, and
  // not for ever, because a run may have been killed.
  if (data.reload_until) {
    let touched = Date.now();
    for (const kind of ["pointerdown", "pointermove", "keydown", "scroll", "wheel"]) {
      window.addEventListener(kind, () => { touched = Date.now(); }, { passive: true });
    }
    setInterval(() => { if (Date.now() - touched > 15000 && Date.now() < data.reload_until) location.reload(); }, 15000);
  }

  // The denoising viewer.
  if (!data.completions.length) return;
  const slider = byId("step"), play = byId("play"), which = byId("which"), viewer = byId("viewer");
  let panes = [], timer = null;

  data.completions.forEach((item, index) => {
    let group = which.lastElementChild;
    if (!group || group.label !== item.kind) {
      group = element("optgroup");
      group.label = item.kind;
      which.append(group);
    }
    const option = element("option", index + 1 + ". " + item.title);
    option.value = index;
    group.append(option);
  });

  function lastStep(completion) {
    return completion.tokens.reduce((most, [, step]) => Math.max(most, step + 1), 0);
  }

  // Which of these are not in the longest row that both have in common, in which all may stand at other places.
  function differing(own, other) {
    if (own.length * other.length > 4e6) return own.map(() => false);
    const common = Array.from({ length: own.length + 1 }, () => new Uint16Array(other.length + 1));
    for (let a = own.length - 1; a >= 0; a--) {
      for (let b = other.length - 1; b >= 0; b--) {
        common[a][b] = own[a] === other[b] ? common[a + 1][b + 1] + 1 : Math.max(common[a + 1][b], common[a][b + 1]);
      }
    }
    const found = own.map(() => true);
    for (let a = 0, b = 0; a < own.length && b < other.length;) {
      if (own[a] === other[b]) { found[a++] = false; b++; }
      else if (common[a + 1][b] >= common[a][b + 1]) a++;
      else b++;
    }
    return found;
  }

  // Places differ one by one where rows are equally long and mostly equal, such as grids of digits.
  function marked(own, other) {
    if (!own.length || !other || !other.length) return own.map(() => false);
    const placed = own.map((each, index) => each !== other[index]);
    const isAligned = own.length === other.length && 2 * placed.filter(Boolean).length <= own.length;
    return isAligned ? placed : differing(own, other);
  }

  // Letters of a drawing or of a single word, or words of a text whose tokens are not known.
  function spell(made, parts, others) {
    const differs = marked(parts, others);
    parts.forEach((each, index) => made.append(differs[index] ? element("span", each, "other") : each));
    return made;
  }

  function words(text) {
    return /\s/.test(text.trim()) ? text.split(/(?<=\s)/) : [...text];
  }

  function show(index) {
    stop();
    which.value = index;
    const item = data.completions[index];
    byId("prompt").textContent = item.prompt.trim();
    byId("drawing").textContent = item.drawing;
    byId("drawing").hidden = !item.drawing;
    byId("panes").replaceChildren();
    panes = item.panes.map((completion, number) => {
      const box = element("div"), text = element("div", undefined, "text");
      const other = item.panes.length > 1 ? item.panes[number ? 0 : 1] : null;
      text.dir = "auto";
      box.append(element("h3", completion.title));
      const canvas = element("pre", undefined, "drawing");
      if (completion.drawing) box.append(spell(canvas, [...completion.drawing], other && [...other.drawing]));
      box.append(text, element("p", completion.about, "soft"));
      byId("panes").append(box);
      const last = lastStep(completion), texts = (each) => each.tokens.map(([token]) => token);
      const differs = marked(texts(completion), other && texts(other));
      const tokens = completion.tokens.map(([token, revealed, confidence], place) => {
        const made = element("span", undefined, "token"), step = revealed < 0 ? last - 1 : revealed;
        made.title = "step " + (step + 1) + ", confidence " + short(confidence);
        made.classList.toggle("other", differs[place]);
        text.append(made);
        return { made, token, step, confidence };
      });
      if (!tokens.length) spell(text, words(completion.text), other && words(other.text));
      return { tokens, last };
    });
    slider.max = Math.max(...panes.map((pane) => pane.last));
    slider.disabled = play.disabled = slider.max === "0";
    byId("steps").hidden = byId("colours").hidden = slider.disabled;
    slider.value = slider.max;
    reveal();
  }

  function reveal() {
    const now = Number(slider.value), most = Number(slider.max);
    for (const { tokens, last } of panes) {
      for (const { made, token, step, confidence } of tokens) {
        const masked = step >= now;
        made.textContent = masked ? "▒" : token.replaceAll("\n", "⏎\n");
        made.classList.toggle("masked", masked);
        made.classList.toggle("new", step === now - 1 && now < most);
        const hue = 260 * (1 - step / Math.max(last - 1, 1));
        made.style.background = masked ? "" : "hsl(" + hue + " 75% 55% / " + (0.08 + 0.5 * confidence) + ")";
      }
    }
    byId("position").textContent = slider.disabled ? "steps unknown" : "step " + now + " of " + most;
    slider.setAttribute("aria-valuetext", byId("position").textContent);
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
    play.setAttribute("aria-pressed", "false");
  }

  function start() {
    if (timer !== null) return stop();
    if (slider.disabled) return;
    if (slider.value === slider.max) slider.value = 0;
    play.textContent = "Pause";
    play.setAttribute("aria-pressed", "true");
    reveal();
    timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      reveal();
      if (slider.value === slider.max) stop();
    }, Math.min(400, Math.max(40, 5000 / Number(slider.max))));
  }

  function move(by) {
    stop();
    slider.value = Number(slider.value) + by;
    reveal();
  }

  function turn(by) {
    const count = data.completions.length;
    show((Number(which.value) + by + count) % count);
  }

  slider.addEventListener("input", () => { stop(); reveal(); });
  play.addEventListener("click", start);
  which.addEventListener("change", () => show(Number(which.value)));
  byId("earlier").addEventListener("click", () => turn(-1));
  byId("later").addEventListener("click", () => turn(1));
  for (const link of document.querySelectorAll("button[data-item]")) {
    link.addEventListener("click", () => { show(Number(link.dataset.item)); viewer.scrollIntoView(); viewer.focus(); });
  }
  const keys = {
    " ": start,
    ArrowLeft: () => move(-1),
    ArrowRight: () => move(1),
    Home: () => move(-Number(slider.max)),
    End: () => move(Number(slider.max)),
    ArrowUp: () => turn(-1),
    ArrowDown: () => turn(1),
  };
  viewer.addEventListener("keydown", (event) => {
    // Buttons and lists have keys of their own.
    if (!(event.key in keys) || event.target === which || event.target.tagName === "BUTTON") return;
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    keys[event.key]();
  });
  show(0);
})();
