"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const chosen = new Map(charts.map((chart) => [chart.key, 0]));
  const hidden = new Set();
  // A finger that drags over a chart wants to scroll the page.
  const touch = matchMedia("(pointer: coarse)").matches;
  const config = { responsive: true, displayModeBar: false, showTips: false };

  function colours() {
    const style = getComputedStyle(document.documentElement);
    const of = (name) => style.getPropertyValue(name).trim();
    return { page: of("--page"), ink: of("--ink"), soft: of("--soft"), rule: of("--rule"),
      grid: of("--grid"), font: getComputedStyle(document.body).fontFamily };
  }

  function themed(layout, theme) {
    const full = {
      ...layout,
      autosize: true,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: theme.font, size: 13, color: theme.ink },
      hoverlabel: { bgcolor: theme.page, bordercolor: theme.rule,
        font: { family: theme.font, size: 13, color: theme.ink } },
    };
    if (touch) full.dragmode = false;
    for (const name of ["xaxis", "yaxis"]) {
      full[name] = { ...layout[name], gridcolor: theme.grid, linecolor: theme.rule,
        tickfont: { color: theme.soft }, fixedrange: touch };
      full[name].title = { ...layout[name].title, font: { size: 13, color: theme.soft } };
    }
    if (layout.hovermode === "x unified") {
      Object.assign(full.xaxis, { spikecolor: theme.soft, spikethickness: -1, spikedash: "solid" });
    }
    return full;
  }

  function draw(chart, theme) {
    if (!chart.views.length) return;
    chart.views[chosen.get(chart.key)].forEach((figure, index) => {
      const data = figure.data.map((trace) => (
        { ...trace, visible: !(trace.meta && hidden.has(chart.part + trace.meta.run)) }));
      Plotly.react(`${chart.key}-${index}`, data, themed(figure.layout, theme), config);
    });
  }

  function drawAll() {
    const theme = colours();
    charts.forEach((chart) => draw(chart, theme));
  }

  for (const select of document.querySelectorAll("select[data-chart]")) {
    const chart = charts.find((one) => one.key === select.dataset.chart);
    select.addEventListener("change", () => {
      chosen.set(chart.key, Number(select.value));
      draw(chart, colours());
      const reading = document.getElementById(`${chart.key}-reading`);
      if (reading) reading.textContent = chart.readings[select.value];
    });
  }

  const buttons = [...document.querySelectorAll("button[data-run]")];
  for (const button of buttons) {
    button.addEventListener("click", () => {
      const run = button.dataset.run;
      const shows = hidden.delete(run);
      if (!shows) hidden.add(run);
      for (const other of buttons) {
        if (other.dataset.run === run) other.setAttribute("aria-pressed", String(shows));
      }
      drawAll();
    });
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  // Paper is white, whatever the screen is.
  addEventListener("beforeprint", drawAll);
  matchMedia("print").addEventListener("change", drawAll);
  drawAll();
})();
