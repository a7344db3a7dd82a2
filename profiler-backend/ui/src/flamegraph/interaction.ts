import { ROOT, type FrameTree } from "./tree.ts";

/** What the pointer and the keyboard do to a flame graph. */
export interface Target {
  tree(): FrameTree;
  /** The drawn frame at a point of the window. */
  hit(clientX: number, clientY: number): number | undefined;
  selected(): number | undefined;
  zoomed(): number;
  hover(node: number | undefined, clientX: number, clientY: number): void;
  select(node: number): void;
  zoom(node: number): void;
  menu(node: number, clientX: number, clientY: number): void;
  /** Middle of a frame in the window, where its menu opens from the keyboard. */
  middle(node: number): [clientX: number, clientY: number];
  /** The next larger thing to undo: zoom, then search, then focus. */
  escape(): void;
}

/** Connects the events of `element` to `target`; `up` is set where callers are drawn upwards. */
export function listen(element: HTMLElement, target: Target, up: boolean): void {
  element.addEventListener("pointermove", ({ clientX, clientY }) => {
    target.hover(target.hit(clientX, clientY), clientX, clientY);
  });
  for (const left of ["pointerleave", "blur"]) {
    element.addEventListener(left, () => target.hover(undefined, 0, 0));
  }
  element.addEventListener("click", (event) => {
    const node = clicked(event, target);
    if (node === undefined) return;
    target.select(node);
    target.zoom(node);
  });
  element.addEventListener("contextmenu", (event) => {
    const node = clicked(event, target);
    if (node === undefined) return;
    event.preventDefault();
    target.select(node);
    target.menu(node, event.clientX, event.clientY);
  });
  element.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (press(event.key, target, up)) event.preventDefault();
  });
}

/** Assistive technology clicks elements, not points: then the element names the frame. */
function clicked(event: MouseEvent, target: Target): number | undefined {
  if (event.detail > 0 || event.type === "contextmenu") return target.hit(event.clientX, event.clientY);
  const named = event.target instanceof HTMLElement ? Number(event.target.dataset["node"]) : Number.NaN;
  return Number.isInteger(named) && named < target.tree().length ? named : undefined;
}

function press(key: string, target: Target, up: boolean): boolean {
  const node = target.selected() ?? target.zoomed();
  switch (key) {
    case "Enter":
      target.zoom(node);
      return true;
    case " ":
    case "ContextMenu":
      target.menu(node, ...target.middle(node));
      return true;
    case "Escape":
      target.escape();
      return true;
    case "Home":
      target.select(ROOT);
      return true;
    default:
      return move(key, node, target, up);
  }
}

function move(key: string, node: number, target: Target, up: boolean): boolean {
  const to = neighbor(target.tree(), key, node, up);
  if (to === null) return false;
  if (to !== undefined) {
    target.select(to);
    target.hover(to, ...target.middle(to));
  }
  return true;
}

/** The frame an arrow key leads to; `undefined` at the edge, `null` for any other key. */
export function neighbor(tree: FrameTree, key: string, node: number, up: boolean): number | undefined | null {
  const [outward, inward] = up ? ["ArrowDown", "ArrowUp"] : ["ArrowUp", "ArrowDown"];
  switch (key) {
    case outward:
      return node === ROOT ? undefined : tree.parent[node]!;
    case inward:
      return tree.firstChild(node);
    case "ArrowRight":
      return tree.nextSibling(node);
    case "ArrowLeft":
      return tree.previousSibling(node);
    default:
      return null;
  }
}
