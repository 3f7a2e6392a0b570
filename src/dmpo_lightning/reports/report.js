"use strict";
// All text of the page's data is put into the page by textContent, so that none of it is read as HTML.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);

  function element(tag, text, className) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  function short(value) {
    return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(4)));
  }

  // Plots: the values nearest to the pointer are written below.
  for (const figure of document.querySelectorAll("figure[data-plot]")) {
    const plot = data.plots[figure.dataset.plot];
    const area = figure.querySelector(".plot");
    const cursor = figure.querySelector(".cursor");
    const output = figure.querySelector("output");
    area.addEventListener("pointermove", (event) => {
      const box = area.getBoundingClientRect();
      const share = (event.clientX - box.left) / box.width;
      const along = (share - plot.left) / (plot.right - plot.left);
      if (along < 0 || along > 1) return;
      const x = plot.x[0] + along * (plot.x[1] - plot.x[0]);
      const found = [];
      let nearest = null;
      for (const series of plot.series) {
        let best = -1;
        series.x.forEach((each, index) => {
          if (best < 0 || Math.abs(each - x) < Math.abs(series.x[best] - x)) best = index;
        });
        if (best < 0) continue;
        if (nearest === null || Math.abs(series.x[best] - x) < Math.abs(nearest - x)) nearest = series.x[best];
        const error = series.e.length ? " ± " + short(series.e[best]) : "";
        found.push((series.label ? series.label + " " : "") + short(series.y[best]) + error);
      }
      if (nearest === null) return;
      output.textContent = plot.axis + " " + short(nearest) + ": " + found.join(", ");
      const place = plot.left + ((nearest - plot.x[0]) / (plot.x[1] - plot.x[0])) * (plot.right - plot.left);
      cursor.style.display = "block";
      cursor.style.left = 100 * place + "%";
      cursor.style.top = 100 * plot.top + "%";
      cursor.style.height = 100 * (plot.bottom - plot.top) + "%";
    });
    area.addEventListener("pointerleave", () => {
      cursor.style.display = "none";
      output.textContent = "";
    });
  }

  // The denoising viewer.
  if (!data.completions.length) return;
  const slider = byId("step"), play = byId("play"), which = byId("which"), viewer = byId("viewer");
  let panes = [], timer = null;

  data.completions.forEach((item, index) => {
    const option = element("option", item.title);
    option.value = index;
    which.append(option);
  });

  function lastStep(completion) {
    return completion.steps.reduce((most, step) => Math.max(most, step + 1), 0);
  }

  function show(index) {
    stop();
    which.value = index;
    const item = data.completions[index];
    byId("about").textContent = item.about;
    byId("prompt").textContent = item.prompt;
    byId("panes").replaceChildren();
    panes = item.panes.map((completion) => {
      const box = element("div"), text = element("div", undefined, "text");
      text.dir = "auto";
      box.append(element("h3", completion.title), text, element("p", completion.about, "soft"));
      byId("panes").append(box);
      const last = lastStep(completion);
      const tokens = completion.tokens.map((token, place) => {
        const made = element("span", undefined, "token");
        const step = completion.steps[place] < 0 ? last - 1 : completion.steps[place];
        made.title = "step " + (step + 1) + ", confidence " + short(completion.confidences[place]);
        text.append(made);
        return { made, token, step, confidence: completion.confidences[place] };
      });
      if (!tokens.length) text.textContent = completion.text;
      return { tokens, last };
    });
    slider.max = Math.max(...panes.map((pane) => pane.last));
    slider.disabled = play.disabled = slider.max === "0";
    slider.value = slider.max;
    draw();
  }

  function draw() {
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

  function toggle() {
    if (timer !== null) return stop();
    if (slider.disabled) return;
    if (slider.value === slider.max) slider.value = 0;
    play.textContent = "Pause";
    play.setAttribute("aria-pressed", "true");
    draw();
    timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      draw();
      if (slider.value === slider.max) stop();
    }, Math.min(400, Math.max(40, 5000 / Number(slider.max))));
  }

  function move(by) {
    stop();
    slider.value = Number(slider.value) + by;
    draw();
  }

  function turn(by) {
    const count = data.completions.length;
    show((Number(which.value) + by + count) % count);
  }

  slider.addEventListener("input", () => { stop(); draw(); });
  play.addEventListener("click", toggle);
  which.addEventListener("change", () => show(Number(which.value)));
  byId("earlier").addEventListener("click", () => turn(-1));
  byId("later").addEventListener("click", () => turn(1));
  const keys = {
    " ": toggle,
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
