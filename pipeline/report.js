// Values under the pointer on line charts. Without it the page loses nothing but that.
"use strict";
for (const chart of document.querySelectorAll("svg.chart")) {
  const cross = chart.querySelector(".cross");
  const figure = chart.closest("figure");
  const ends = figure.querySelector(".ends");
  const values = [...figure.querySelectorAll(".legend b")]; // one for each line where there are several
  const still = [ends, ...values].map(place => place.textContent);
  const lines = [...chart.querySelectorAll("polyline")].map(line => ({
    read: JSON.parse(line.dataset.read), points: line.points }));
  const leave = () => {
    cross.setAttribute("hidden", "hidden");
    [ends, ...values].forEach((place, i) => { place.textContent = still[i]; });
  };
  const move = event => {
    const box = chart.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * chart.viewBox.baseVal.width;
    let at = null;
    const shown = lines.map(line => {
      let near = 0;
      for (let i = 1; i < line.points.length; i++)
        if (Math.abs(line.points[i].x - x) < Math.abs(line.points[near].x - x)) near = i;
      at ??= { x: line.points[near].x, step: line.read[near][0] };
      return line.read[near][1];
    });
    cross.setAttribute("x1", at.x);
    cross.setAttribute("x2", at.x);
    cross.removeAttribute("hidden");
    ends.textContent = chart.dataset.unit + " " + at.step + (values.length ? "" : ": " + shown[0]);
    values.forEach((place, i) => { place.textContent = shown[i]; });
  };
  chart.addEventListener("pointermove", move);
  chart.addEventListener("pointerdown", move);
  chart.addEventListener("pointerleave", leave);
}
