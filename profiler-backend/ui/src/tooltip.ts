import { h, placeAt } from "./dom.ts";
import { percent, quantity } from "./format.ts";
import { FRAME_KINDS } from "./flamegraph/kind.ts";
import { ROOT, type FrameTree } from "./flamegraph/tree.ts";

/** The box that follows the pointer. */
export class Tooltip {
  private readonly element = h("div", { class: "tooltip", role: "tooltip", hidden: true });

  constructor() {
    document.body.append(this.element);
  }

  show(content: readonly Node[], clientX: number, clientY: number): void {
    this.element.replaceChildren(...content);
    this.element.hidden = false;
    placeAt(this.element, clientX + 14, clientY + 16);
  }

  hide(): void {
    this.element.hidden = true;
  }
}

/** What the tooltip says of a frame. */
export function describeFrame(tree: FrameTree, node: number, unit: string): Node[] {
  const [total, self] = [tree.total[node]!, tree.self[node]!];
  const whole = tree.total[ROOT]!;
  const file = tree.fileOf(node);
  const facts: [string, string][] = [
    ["Total", `${quantity(total, unit)} · ${percent(total, whole)}`],
    ["Self", `${quantity(self, unit)} · ${percent(self, whole)}`],
  ];
  if (node !== ROOT) {
    facts.push(["Of parent", percent(total, tree.total[tree.parent[node]!]!)]);
    facts.push(["Kind", FRAME_KINDS[tree.kindOf(node)]!.label]);
  }
  const name = h("div", { class: "tooltip-name" }, tree.nameOf(node));
  const list = h("dl", {}, ...facts.flatMap(([term, value]) => [h("dt", {}, term), h("dd", {}, value)]));
  return file === "" ? [name, list] : [name, h("div", { class: "tooltip-file" }, file), list];
}
