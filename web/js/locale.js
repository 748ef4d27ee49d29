// The texts of this pack's widgets, in the language of the page. They live in locales/<language>/, where the
// page itself finds the names and tooltips of the nodes.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const FALLBACK = "en";

/** What the server knows of all packs: {en: {hydit: {...}, nodeDefs: {...}}, zh: {...}}. */
const translations = await loadTranslations();

async function loadTranslations() {
  try {
    const response = await api.fetchApi("/i18n");
    return response.ok ? await response.json() : {};
  } catch (error) {
    console.warn("[hydit] no translations:", error);
    return {};
  }
}

function language() {
  const chosen = app.extensionManager?.setting?.get?.("Comfy.Locale");
  return chosen && translations[chosen]?.hydit ? chosen : FALLBACK;
}

/** The text of a dotted key below "hydit" in main.json, with {names} filled in. */
export function text(key, values = {}) {
  const find = (from) => key.split(".").reduce((part, name) => part?.[name], translations[from]?.hydit);
  const found = find(language()) ?? find(FALLBACK) ?? key;
  return found.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

/**
 * A report, which Python writes in English, in the language of the page as far as its words are known: by the
 * patterns that `words` has below "hydit" in main.json.
 */
export function translateReport(said, words) {
  const rules = translations[language()]?.hydit?.[words]?.rules ?? { first: {}, lines: {} };
  const apply = (line, patterns) =>
    Object.entries(patterns).reduce((so, [from, to]) => so.replace(new RegExp(from, "g"), to), line);
  // The first line counts; the others quote prompts, names and trigger words, of which nothing may be changed.
  return said
    .split("\n")
    .map((line, i) => apply(line, i ? rules.lines : rules.first))
    .join("\n");
}

/** What the options of a node's combos are called, as {input: {option: label}}. */
export function optionLabels(nodeId) {
  const inputs = translations[language()]?.nodeDefs?.[nodeId]?.inputs ?? {};
  return Object.fromEntries(
    Object.entries(inputs)
      .filter(([, input]) => input.options)
      .map(([name, input]) => [name, input.options]),
  );
}
