"use strict";
// Without this script, all pictures of a row are shown next to each other.
for (const row of document.querySelectorAll(".shots[data-slides]")) {
  const figures = [...row.querySelectorAll("figure")];
  if (figures.length < 2) continue;
  const box = document.createElement("div");
  const slider = document.createElement("input");
  const shown = document.createElement("output");
  box.className = "slider";
  Object.assign(slider, { type: "range", min: 0, max: figures.length - 1, value: figures.length - 1 });
  slider.setAttribute("aria-label", "Step of the samples");
  const choose = () => {
    const chosen = Number(slider.value);
    figures.forEach((figure, index) => { figure.hidden = index !== chosen; });
    shown.textContent = figures[chosen].dataset.step;
    slider.setAttribute("aria-valuetext", figures[chosen].dataset.step);
  };
  slider.addEventListener("input", choose);
  box.append(slider, shown);
  row.before(box);
  row.classList.add("one");
  choose();
}
