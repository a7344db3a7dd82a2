type Handler = (event: never) => void;
export type Attributes = Record<string, string | boolean | Handler | undefined>;
export type Child = Node | string;

/**
 * Creates an element. A string becomes an attribute, `true` an empty one, a function a listener (`onclick`);
 * `false` and `undefined` are left out. Children given as strings become text nodes, so nothing is ever parsed as HTML.
 */
export function h<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  attributes: Attributes = {},
  ...children: Child[]
): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") {
      element.addEventListener(name.slice(2), value as EventListener);
    } else if (value !== undefined && value !== false) {
      element.setAttribute(name, value === true ? "" : value);
    }
  }
  element.append(...children);
  return element;
}

/** Finds an element of `index.html`; a missing one is a mistake of ours. */
export function byId<T extends HTMLElement>(id: string, type: new () => T): T {
  const element = document.getElementById(id);
  if (!(element instanceof type)) throw new Error(`index.html has no ${type.name} with id ${id}`);
  return element;
}

/** Puts `panel` under `anchor`, moved left as far as needed to stay inside the window. */
export function placeUnder(panel: HTMLElement, anchor: Element): void {
  const { left, bottom } = anchor.getBoundingClientRect();
  placeAt(panel, left, bottom + 4);
}

/** Puts `panel` at a point of the window, moved so that all of it stays visible. */
export function placeAt(panel: HTMLElement, x: number, y: number): void {
  const margin = 8;
  const { offsetWidth, offsetHeight } = panel;
  const left = Math.min(x, window.innerWidth - offsetWidth - margin);
  const top = Math.min(y, window.innerHeight - offsetHeight - margin);
  panel.style.left = `${Math.max(margin, left)}px`;
  panel.style.top = `${Math.max(margin, top)}px`;
}

/** Sizes a canvas for the screen's pixel ratio; drawing then uses CSS pixels. Resizing clears it. */
export function fitCanvas(
  canvas: HTMLCanvasElement,
  width: number,
  height: number,
): CanvasRenderingContext2D {
  const ratio = window.devicePixelRatio || 1;
  const [pixelWidth, pixelHeight] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== pixelWidth) canvas.width = pixelWidth;
  if (canvas.height !== pixelHeight) canvas.height = pixelHeight;
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  if (!context) throw new Error("this browser has no 2D canvas");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}
