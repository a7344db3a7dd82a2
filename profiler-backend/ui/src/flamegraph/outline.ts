import { h } from "../dom.ts";
import { percent, quantity } from "../format.ts";
import type { Boxes } from "./layout.ts";
import { LEVEL_HEIGHT } from "./render.ts";
import { ROOT, type FrameTree } from "./tree.ts";

/** Narrower boxes carry no readable label, on the canvas or here. */
const WIDTH_MIN = 16;
const ITEMS_MAX = 500;

/** The drawn frames as an ARIA tree: transparent boxes over the drawn ones, for screen readers and find-in-page. */
export class Outline {
  readonly element: HTMLElement;
  private readonly prefix: string;
  private items = new Map<number, HTMLElement>();

  constructor(prefix: string, label: string) {
    this.prefix = prefix;
    this.element = h("div", { class: "frames", role: "tree", tabindex: "0", "aria-label": label });
  }

  /** Replaces the tree; `top` gives the top of a level inside the element. */
  show(tree: FrameTree, boxes: Boxes, unit: string, top: (level: number) => number): void {
    this.items = new Map();
    for (let index = 0; index < boxes.count && this.items.size < ITEMS_MAX; index += 1) {
      if (boxes.width[index]! < WIDTH_MIN) continue;
      const node = boxes.node[index]!;
      const item = this.item(tree, node, unit);
      item.style.left = `${boxes.left[index]!}px`;
      item.style.top = `${top(tree.level[node]!)}px`;
      item.style.width = `${boxes.width[index]!}px`;
      item.style.height = `${LEVEL_HEIGHT}px`;
      this.items.set(node, item);
    }
    this.element.replaceChildren(...this.items.values());
  }

  /** Tells assistive technology which frame the keyboard is on. */
  activate(node: number | undefined): void {
    const item = node === undefined ? undefined : this.items.get(node);
    this.element.querySelector("[aria-selected=true]")?.setAttribute("aria-selected", "false");
    item?.setAttribute("aria-selected", "true");
    if (item) this.element.setAttribute("aria-activedescendant", item.id);
    else this.element.removeAttribute("aria-activedescendant");
  }

  private item(tree: FrameTree, node: number, unit: string): HTMLElement {
    const share = percent(tree.total[node]!, tree.total[ROOT]!);
    return h(
      "div",
      {
        id: `${this.prefix}-${node}`,
        role: "treeitem",
        "aria-level": String(tree.level[node]! + 1),
        "aria-selected": "false",
        "aria-description": `${quantity(tree.total[node]!, unit)}, ${share}`,
        "data-node": String(node),
        "data-total": String(tree.total[node]!),
      },
      tree.nameOf(node),
    );
  }
}
