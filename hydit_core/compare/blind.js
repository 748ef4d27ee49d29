"use strict";
const fields = [...document.querySelectorAll("fieldset")];
function collect() {
  const lines = [];
  for (const field of fields) {
    const chosen = field.querySelector("input:checked");
    if (chosen) lines.push(field.dataset.number + " " + chosen.value);
  }
  document.getElementById("answers").value = lines.join("\n");
  document.getElementById("count").textContent = lines.length;
}
document.addEventListener("change", collect);
collect();
