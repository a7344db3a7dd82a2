import { ROOT, type FrameTree } from "./tree.ts";

/** The part of the horizontal axis that is shown, in the unit of the tree's totals. */
export interface Range {
  readonly from: number;
  readonly to: number;
}

/** The boxes to draw, as columns; in pre-order, so callers come before what they call. */
export interface Boxes {
  readonly count: number;
  readonly node: Uint32Array;
  /** Left edge and width in CSS pixels, both inside the given width. */
  readonly left: Float32Array;
  readonly width: Float32Array;
  /** Deepest level among them. */
  readonly deepest: number;
}

/** Narrower than this a box cannot be seen, and what is below it is narrower still. */
export const WIDTH_MIN = 0.5;

/** The whole width of `node`. */
export function rangeOf(tree: FrameTree, node: number): Range {
  const from = tree.start[node]!;
  return { from, to: from + tree.total[node]! };
}

/** Places every box that is inside `range` and wide enough to be seen. */
export function layout(tree: FrameTree, range: Range, width: number): Boxes {
  const scale = width / Math.max(range.to - range.from, Number.MIN_VALUE);
  const boxes = {
    node: new Uint32Array(tree.length),
    left: new Float32Array(tree.length),
    width: new Float32Array(tree.length),
  };
  let [count, deepest] = [0, 0];
  for (let node = ROOT; node < tree.length;) {
    const left = Math.max(0, (tree.start[node]! - range.from) * scale);
    const right = Math.min(width, (tree.start[node]! + tree.total[node]! - range.from) * scale);
    if (!(right - left >= WIDTH_MIN)) {
      node = tree.end[node]!;
      continue;
    }
    boxes.node[count] = node;
    boxes.left[count] = left;
    boxes.width[count] = right - left;
    deepest = Math.max(deepest, tree.level[node]!);
    count += 1;
    node += 1;
  }
  return { ...boxes, count, deepest };
}

/** The range between two others; `part` goes from 0 to 1. */
export function between(from: Range, to: Range, part: number): Range {
  return { from: from.from + (to.from - from.from) * part, to: from.to + (to.to - from.to) * part };
}
