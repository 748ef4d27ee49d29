"use strict";
const pairs = [...document.querySelectorAll(".pair")];
const select = document.getElementById("side");
const box = document.getElementById("difference");
for (const pair of pairs) {
  const slider = pair.querySelector("input");
  const move = () => pair.style.setProperty("--split", slider.value + "%");
  slider.addEventListener("input", move);
  move();
}
function show() {
  const chosen = select ? select.value : null;
  for (const one of document.querySelectorAll("[data-side]")) {
    const other = chosen !== null && one.dataset.side !== chosen;
    one.hidden = other || (one.classList.contains("difference") && !box.checked);
  }
  for (const pair of pairs) {
    pair.classList.toggle("differing", box.checked);
    if (chosen !== null) pair.querySelector(".tag.right").textContent = chosen;
  }
}
if (select) select.addEventListener("change", show);
box.addEventListener("change", show);
show();
