// The studio's pages: films, timelines, the map and the driver. Used by the app and by the exported page.
window.latentact = (() => {
  "use strict";
  const PALETTE = [
    "#4269d0", "#efb118", "#ff725c", "#3ca951", "#a463f2", "#6cc5b0", "#ff8ab7", "#9c6b4e", "#97bbf5", "#9498a0",
    "#d6604d", "#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#e6ab02", "#a6761d", "#1f78b4", "#b2df8a", "#fb9a99",
    "#cab2d6", "#ffcf5c", "#8dd3c7", "#bc80bd",
  ];
  const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
  const paint = (group) => PALETTE[group % PALETTE.length];

  function make(tag, props, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(props || {})) {
      if (name in node && name !== "role") node[name] = value;
      else node.setAttribute(name, value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  }

  const css = (node, name, fallback) => getComputedStyle(node).getPropertyValue(name).trim() || fallback;

  // One frame of a sheet at a time.
  function film(label, sheet) {
    const canvas = make("canvas", { className: "st-frame", width: sheet.w, height: sheet.h, role: "img", "aria-label": label });
    const image = new Image();
    let at = 0;
    const draw = () => {
      if (!image.complete) return;
      const x = (at % sheet.columns) * sheet.w, y = Math.floor(at / sheet.columns) * sheet.h;
      canvas.getContext("2d").drawImage(image, x, y, sheet.w, sheet.h, 0, 0, sheet.w, sheet.h);
      canvas.dataset.shown = at;
    };
    const ready = new Promise((resolve) => { image.onload = () => { draw(); resolve(); }; });
    image.src = sheet.uri;
    return {
      ready,
      node: make("figure", {}, canvas, make("figcaption", { textContent: label })),
      canvas,
      n: sheet.n,
      show(i) { at = clamp(i, 0, sheet.n - 1); draw(); },
    };
  }

  // A slider and a play button; `changed(i)` at every step.
  function player(n, fps, changed) {
    const slider = make("input", { type: "range", min: 0, max: Math.max(n - 1, 0), value: 0, "aria-label": "step" });
    const button = make("button", { type: "button", className: "st-play", textContent: "Play" });
    let timer = 0;
    const go = (i) => { slider.value = i; changed(Number(slider.value)); };
    const stop = () => { clearInterval(timer); timer = 0; button.textContent = "Play"; };
    button.onclick = () => {
      if (timer) return stop();
      button.textContent = "Pause";
      timer = setInterval(() => (button.isConnected ? go((Number(slider.value) + 1) % n) : stop()), 1000 / (fps || 10));
      return undefined;
    };
    slider.oninput = () => go(Number(slider.value));
    return { node: make("div", { className: "st-player" }, button, slider), go, stop, get at() { return Number(slider.value); } };
  }

  const GUTTER = 96;

  // Rows over time on a canvas: blocks of colors, heat from -1 to 1, or a line with a reference.
  function timeline(rows, n, handlers) {
    const canvas = make("canvas", { className: "st-timeline", tabIndex: 0, role: "img", "aria-label": rows.map((row) => row.name).join(", ") });
    const heights = rows.map((row) => row.height || 22);
    const total = heights.reduce((sum, height) => sum + height + 4, 0);
    let at = 0, range = null, from = null;
    function draw() {
      const width = canvas.clientWidth, scale = window.devicePixelRatio || 1;
      if (!width) return;
      canvas.width = width * scale;
      canvas.height = total * scale;
      const pen = canvas.getContext("2d"), cell = (width - GUTTER) / n;
      const ink = css(canvas, "--st-ink", "#1e2228"), soft = css(canvas, "--st-soft", "#59616c"), accent = css(canvas, "--st-accent", "#0d8a72");
      pen.scale(scale, scale);
      pen.font = `12px ${css(canvas, "--st-font", "sans-serif")}`;
      pen.textBaseline = "middle";
      let y = 0;
      rows.forEach((row, r) => {
        const height = heights[r];
        pen.fillStyle = soft;
        pen.fillText(row.name, 0, y + height / 2, GUTTER - 8);
        if (row.kind === "line") line(pen, row, cell, y, height, accent, soft);
        else row.values.forEach((value, i) => {
          if (value === null) return;
          pen.fillStyle = row.kind === "heat" ? heat(value) : paint(value);
          pen.fillRect(GUTTER + i * cell, y, Math.max(cell - (cell > 4 ? 1 : 0), 0.6), height);
          if (row.texts && cell > 7 * String(row.texts[i]).length + 2) {
            pen.fillStyle = "#fff";
            pen.textAlign = "center";
            pen.fillText(row.texts[i], GUTTER + (i + 0.5) * cell, y + height / 2 + 1);
            pen.textAlign = "start";
          }
        });
        y += height + 4;
      });
      if (range) {
        pen.fillStyle = accent;
        pen.globalAlpha = 0.22;
        pen.fillRect(GUTTER + range[0] * cell, 0, (range[1] - range[0]) * cell, y);
        pen.globalAlpha = 1;
      }
      pen.strokeStyle = ink;
      pen.lineWidth = 2;
      pen.strokeRect(GUTTER + clamp(at, 0, n - 1) * cell, 1, Math.max(cell, 2), y - 5);
    }
    const step = (event) => clamp(Math.floor((event.offsetX - GUTTER) / ((canvas.clientWidth - GUTTER) / n)), 0, n - 1);
    canvas.onpointerdown = (event) => { from = step(event); canvas.setPointerCapture(event.pointerId); handlers.step(from); };
    canvas.onpointermove = (event) => {
      if (from === null) return;
      const to = step(event);
      if (handlers.range) { range = [Math.min(from, to), Math.max(from, to) + 1]; draw(); } else handlers.step(to);
    };
    canvas.onpointerup = () => {
      if (from !== null && handlers.range && range) handlers.range(range);
      if (from !== null && handlers.settled) handlers.settled();
      from = null;
    };
    canvas.onkeydown = (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move) return;
      event.preventDefault();
      handlers.step(clamp(at + move, 0, n - 1));
      if (handlers.settled) handlers.settled();
    };
    canvas.style.height = `${total}px`;
    new ResizeObserver(draw).observe(canvas);
    return { node: canvas, show(i) { at = i; draw(); }, select(pair) { range = pair; draw(); } };
  }

  function line(pen, row, cell, top, height, accent, soft) {
    const highest = Math.max(1e-9, ...row.values, ...(row.reference || []));
    for (const [values, ink] of [[row.reference, soft], [row.values, accent]]) {
      if (!values) continue;
      pen.strokeStyle = ink;
      pen.lineWidth = 1.5;
      pen.beginPath();
      values.forEach((value, i) => pen.lineTo(GUTTER + (i + 0.5) * cell, top + height - 1 - (height - 2) * (value / highest)));
      pen.stroke();
    }
  }

  // -1 blue, 0 pale, 1 orange.
  function heat(value) {
    const v = clamp(value, -1, 1), t = Math.abs(v);
    const end = v < 0 ? [38, 96, 200] : [216, 92, 16], mix = end.map((c) => Math.round(236 + (c - 236) * t));
    return `rgb(${mix.join(",")})`;
  }

  // All latent actions as points; the demonstration's are ringed, and the current one stands out.
  function map(data, handlers) {
    const canvas = make("canvas", { className: "st-map", role: "img", "aria-label": "map of all latent actions" });
    const all = data.map.x.concat(data.point.x), tall = data.map.y.concat(data.point.y);
    const bounds = [Math.min(...all), Math.max(...all), Math.min(...tall), Math.max(...tall)];
    let at = 0;
    const place = (x, y) => {
      const [w, h] = [canvas.clientWidth, canvas.clientHeight];
      return [
        12 + ((w - 24) * (x - bounds[0])) / Math.max(bounds[1] - bounds[0], 1e-9),
        h - 12 - ((h - 24) * (y - bounds[2])) / Math.max(bounds[3] - bounds[2], 1e-9),
      ];
    };
    function draw() {
      const scale = window.devicePixelRatio || 1;
      canvas.width = canvas.clientWidth * scale;
      canvas.height = canvas.clientHeight * scale;
      const pen = canvas.getContext("2d"), ink = css(canvas, "--st-ink", "#1e2228");
      const dot = (x, y, size) => { pen.beginPath(); pen.arc(...place(x, y), size, 0, 7); };
      pen.scale(scale, scale);
      pen.globalAlpha = 0.55;
      data.map.x.forEach((x, i) => { pen.fillStyle = paint(data.map.group[i]); dot(x, data.map.y[i], 2.5); pen.fill(); });
      pen.globalAlpha = 1;
      data.point.x.forEach((x, i) => { pen.fillStyle = paint(data.groups[i]); dot(x, data.point.y[i], 3.5); pen.fill(); pen.strokeStyle = ink; pen.lineWidth = 0.8; pen.stroke(); });
      pen.lineWidth = 3;
      pen.strokeStyle = ink;
      if (at < data.point.x.length) { dot(data.point.x[at], data.point.y[at], 8); pen.stroke(); }
    }
    canvas.onclick = (event) => {
      const near = (xs, ys) => {
        let best = -1, least = 14 ** 2;
        xs.forEach((x, i) => {
          const [px, py] = place(x, ys[i]), d = (px - event.offsetX) ** 2 + (py - event.offsetY) ** 2;
          if (d < least) [best, least] = [i, d];
        });
        return [best, least];
      };
      const [mine, a] = near(data.point.x, data.point.y), [other, b] = near(data.map.x, data.map.y);
      if (mine >= 0 && a <= b) handlers.step(mine);
      else if (other >= 0) handlers.point(other);
    };
    new ResizeObserver(draw).observe(canvas);
    return { node: canvas, show(i) { at = i; draw(); } };
  }

  // Rows of a guide: its codes or groups, and its principal components.
  function latentRows(data) {
    const rows = [{ name: data.coded ? "code" : "cluster", kind: "blocks", values: data.groups, texts: data.texts, height: 26 }];
    data.components.forEach((values, i) => rows.push({ name: `component ${i + 1}`, kind: "heat", values, height: 14 }));
    return rows;
  }

  function look(root, data, emit) {
    const films = [film("now", data.frames), film("recorded next", data.frames)];
    if (data.predicted) films.push(film("predicted next", data.predicted));
    const difference = data.predicted ? make("canvas", { className: "st-frame", width: data.frames.w, height: data.frames.h, role: "img", "aria-label": "difference" }) : null;
    const overlay = data.saliency ? make("canvas", { className: "st-frame", width: data.frames.w, height: data.frames.h, role: "img", "aria-label": "saliency" }) : null;
    const n = data.groups.length, facts = make("p", { className: "st-facts" });
    const rows = latentRows(data);
    if (data.labels) rows.push({ name: "action", kind: "blocks", values: data.labels, height: 14 });
    if (data.error) rows.push({ name: "error", kind: "line", values: data.error, reference: data.copy, height: 44 });
    const show = (i) => {
      films[0].show(i);
      films[1].show(i + data.gap);
      if (films[2]) films[2].show(i);
      time.show(i);
      places.show(i);
      facts.textContent = data.facts[i];
      if (difference) requestAnimationFrame(() => subtract(difference, films[1].canvas, films[2].canvas));
      if (overlay) requestAnimationFrame(() => shade(overlay, films[0].canvas, data.saliency, i));
      root.dataset.step = i;
    };
    const control = player(n, data.fps, show), settled = () => emit("select", { step: control.at });
    const handlers = { step: (i) => { control.stop(); control.go(i); }, settled, point: (i) => emit("point", { index: i }) };
    const time = timeline(rows, n, handlers);
    const places = map(data, { ...handlers, step: (i) => { handlers.step(i); settled(); } });
    control.node.querySelector("input").onchange = settled;
    const boxed = (canvas, label) => make("figure", {}, canvas, make("figcaption", { textContent: label }));
    root.replaceChildren(
      make("div", { className: "st-films" }, ...films.map((each) => each.node), difference && boxed(difference, "error of the prediction"), overlay && boxed(overlay, "what the latent action responds to")),
      control.node,
      facts,
      make("div", { className: "st-columns" },
        make("div", {}, make("h4", { textContent: "Latent actions over time" }), time.node, make("p", { className: "st-note", textContent: data.note })),
        make("div", {}, make("h4", { textContent: "Map of all latent actions" }), places.node)),
    );
    control.go(clamp(data.start || 0, 0, n - 1));
    Promise.all(films.map((each) => each.ready)).then(() => show(control.at));
    return { go: (i) => handlers.step(i) };
  }

  function subtract(target, a, b) {
    const [w, h] = [target.width, target.height], pen = target.getContext("2d", { willReadFrequently: true });
    const pixels = (source) => { pen.drawImage(source, 0, 0, w, h); return pen.getImageData(0, 0, w, h); };
    const left = pixels(a), right = pixels(b);
    for (let i = 0; i < left.data.length; i += 4) {
      const d = (Math.abs(left.data[i] - right.data[i]) + Math.abs(left.data[i + 1] - right.data[i + 1]) + Math.abs(left.data[i + 2] - right.data[i + 2])) / 3;
      const v = Math.min(255, d * 3);
      left.data.set([v, v * 0.55, v * 0.15, 255], i);
    }
    pen.putImageData(left, 0, 0);
  }

  function shade(target, source, saliency, step) {
    const i = saliency.steps.filter((measured) => measured <= step).length - 1;
    const pen = target.getContext("2d"), side = saliency.side, [w, h] = [target.width, target.height];
    pen.drawImage(source, 0, 0, w, h);
    for (let cell = 0; cell < side * side; cell += 1) {
      pen.fillStyle = `rgba(255,120,20,${(0.75 * saliency.values[i][cell]) / 255})`;
      const x = Math.round(((cell % side) * w) / side), y = Math.round((Math.floor(cell / side) * h) / side);
      pen.fillRect(x, y, Math.ceil(w / side), Math.ceil(h / side));
    }
  }

  function edit(root, data, emit) {
    const films = data.films.map(([label, sheet]) => film(label, sheet));
    const n = data.groups.length, longest = Math.max(n, ...films.map((each) => each.n));
    const show = (i) => { films.forEach((each) => each.show(i)); now.show(i); before.show(i); root.dataset.step = i; };
    const control = player(longest, data.fps, show);
    const pick = (i) => { control.stop(); control.go(i); };
    const before = timeline(latentRows(data.before), data.before.groups.length, { step: pick });
    const now = timeline(latentRows(data), n, { step: pick, range: ([start, stop]) => emit("range", { start, stop }) });
    root.replaceChildren(
      make("div", { className: "st-films" }, ...films.map((each) => each.node)),
      control.node,
      make("h4", { textContent: `Demonstration: ${data.before.groups.length} steps` }), before.node,
      make("h4", { textContent: `Guide: ${n} steps (drag to select)` }), now.node,
    );
    control.go(0);
    if (data.range) now.select(data.range);
    return {};
  }

  function label(root, data, emit) {
    const frames = film("now", data.frames), facts = make("p", { className: "st-facts" });
    const show = (i) => {
      frames.show(i);
      time.show(i);
      root.dataset.step = i;
      const named = data.tracks.map((track) => `${track.name} ${track.texts ? track.texts[i] || "none" : track.values[i] ?? "none"}`);
      facts.textContent = [`step ${i} of ${data.n}`, ...named].join(" · ");
    };
    const control = player(data.n, data.fps, show);
    const rows = [...data.tracks.map((track) => ({ height: 22, ...track })), ...latentRows(data)];
    const time = timeline(rows, data.n, { step: (i) => { control.stop(); control.go(i); }, range: ([start, stop]) => emit("range", { start, stop }) });
    root.replaceChildren(
      make("div", { className: "st-films st-large" }, frames.node),
      control.node, facts,
      make("h4", { textContent: `${data.labeled} of ${data.n} steps labeled (drag to select)` }), time.node,
    );
    control.go(0);
    frames.ready.then(() => show(control.at));
    return {};
  }

  function drive(root, first, emit) {
    const keys = "123456789abcdefghijklmnop";
    let data = first;
    const imagined = make("img", { className: "st-frame", alt: "imagined" }), real = make("img", { className: "st-frame", alt: "environment" });
    const facts = make("p", { className: "st-facts", "aria-live": "polite" }), pad = make("div", { className: "st-pad" });
    const second = make("figure", {}, real, make("figcaption", { textContent: "environment" }));
    const press = (i) => { if (i >= 0 && i < data.controls.length) emit("press", { index: i }); };
    const buttons = () => data.controls.map((control, i) => {
      const button = make("button", { type: "button", className: "st-key", title: control.words || control.name });
      button.append(make("kbd", { textContent: keys[i] || "" }), make("b", { textContent: control.name }), make("small", { textContent: control.words || "" }));
      button.style.setProperty("--key", paint(control.group));
      button.onclick = () => press(i);
      return button;
    });
    const update = (value) => {
      const fresh = JSON.stringify(value.controls) !== JSON.stringify(data.controls) || !pad.children.length;
      data = value;
      imagined.src = data.imagined;
      second.hidden = !data.real;
      if (data.real) real.src = data.real;
      facts.textContent = data.facts;
      root.dataset.steps = data.steps;
      if (fresh) pad.replaceChildren(...buttons());
    };
    const listen = (event) => {
      if (!root.isConnected) return document.removeEventListener("keydown", listen);
      if (!root.offsetParent || event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName)) return undefined;
      const i = keys.indexOf(event.key);
      if (event.key.length === 1 && i >= 0) { event.preventDefault(); press(i); }
      return undefined;
    };
    document.addEventListener("keydown", listen);
    root.replaceChildren(
      make("div", { className: "st-films st-large" }, make("figure", {}, imagined, make("figcaption", { textContent: "imagined by forward dynamics" })), second),
      facts, pad,
    );
    update(first);
    return { update };
  }

  const pages = { look, edit, label, drive };

  // Draw a page into a gr.HTML component and again whenever its value changes.
  function mount(name, element, props, trigger, watch) {
    let shown = null, widget = null, text = "";
    const draw = () => {
      const value = props.value || "";
      const root = element.querySelector(".st-root");
      if (!root || (value === text && shown === root && root.children.length)) return;
      text = value;
      if (!value) { root.replaceChildren(); widget = null; return; }
      const data = JSON.parse(value);
      if (widget && widget.update && shown === root && root.children.length) widget.update(data);
      else widget = pages[name](root, data, trigger);
      shown = root;
    };
    watch("value", draw);
    draw();
  }

  return { mount, pages };
})();
