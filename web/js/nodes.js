// Small tools for all extensions of this pack.

/** The node's id in Python, such as "HyDiTTextEncode". */
export function idOf(node) {
  return node.constructor?.comfyClass ?? node.comfyClass ?? node.type;
}

/** Have `then` called after a method (that may not exist yet), with the same `this` and arguments. */
export function after(object, method, then) {
  const original = object[method];
  object[method] = function (...args) {
    const result = original?.apply(this, args);
    then.apply(this, args);
    return result;
  };
}

export function widgetOf(node, name) {
  return node.widgets?.find((widget) => widget.name === name);
}

/** Whether a widget's value comes from a link and not from the widget. */
export function isLinked(node, name) {
  const slot = node.inputs?.find((input) => input.widget?.name === name || input.name === name);
  return slot?.link !== null && slot?.link !== undefined;
}
