// Draws the charts with the page's colors, follows light and dark, and keeps videos still for those who ask for it.
(() => {
  const value = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const drawn = new Map();

  function axis(own) {
    const grid = { gridcolor: value("--line"), linecolor: value("--line"), zerolinecolor: value("--line") };
    return { automargin: true, tickfont: { color: value("--soft") }, ...grid, ...own };
  }

  function draw(node) {
    const figure = drawn.get(node) || JSON.parse(node.nextElementSibling.textContent);
    drawn.set(node, figure);
    const layout = {
      margin: { l: 48, r: 12, t: 12, b: 44 },
      font: { family: value("--font"), size: 13, color: value("--ink") },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
      hoverlabel: { bgcolor: value("--card"), bordercolor: value("--line"), font: { color: value("--ink") } },
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
      ...figure.layout,
      xaxis: axis(figure.layout.xaxis),
      yaxis: axis(figure.layout.yaxis),
    };
    Plotly.react(node, figure.data, layout, { responsive: true, displayModeBar: false });
  }

  const distinct = ["#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0"];

  // A few whole numbers are kinds (actions, episodes): each gets a color of its own.
  function paint(figure, name) {
    const numbers = figure.colors[name], levels = [...new Set(numbers)].filter((each) => each !== null).sort((a, b) => a - b);
    const bar = { thickness: 12, outlinewidth: 0, len: 0.9 };
    const marker = { color: numbers, colorscale: "Viridis", cauto: true, showscale: true, colorbar: bar };
    if (levels.every(Number.isInteger) && levels.length <= distinct.length) {
      const n = Math.max(levels.length, 1), place = new Map(levels.map((level, i) => [level, i]));
      marker.color = numbers.map((each) => place.get(each) ?? null);
      marker.colorscale = levels.flatMap((_, i) => [[i / n, distinct[i]], [(i + 1) / n, distinct[i]]]);
      Object.assign(marker, { cauto: false, cmin: -0.5, cmax: n - 0.5 });
      Object.assign(bar, { tickvals: levels.map((_, i) => i), ticktext: levels.map(String) });
    }
    Object.assign(figure.data[0].marker, marker);
  }

  function choose(node) {
    const figure = JSON.parse(node.nextElementSibling.textContent);
    drawn.set(node, figure);
    if (!figure.colors) return;
    const names = Object.keys(figure.colors);
    paint(figure, names[0]);
    const label = document.createElement("label");
    const select = document.createElement("select");
    label.className = "choice";
    label.append("Color by ", select);
    for (const name of names) select.add(new Option(name, name));
    select.onchange = () => { paint(figure, select.value); draw(node); };
    node.before(label);
  }

  const charts = [...document.querySelectorAll(".chart")];
  charts.forEach(choose);
  const open = (node) => !node.closest("details:not([open])");
  charts.filter(open).forEach(draw);
  document.querySelectorAll("details").forEach((details) => details.addEventListener("toggle", () => {
    if (details.open) [...details.querySelectorAll(".chart")].filter(open).forEach(draw);
  }));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.filter(open).forEach(draw));
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) {
    document.querySelectorAll("video").forEach((video) => { video.autoplay = false; video.pause(); });
  }
  document.documentElement.dataset.charts = String(document.querySelectorAll(".js-plotly-plot").length);
})();
