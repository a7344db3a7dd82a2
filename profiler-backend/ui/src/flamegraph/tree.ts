import { kindOf } from "./kind.ts";

/** The tree as `/api/v1/merge?format=json` sends it. */
export interface RawTree {
  /** A name per function; the first is the root's. */
  names: string[];
  /** A frame kind per name. */
  kinds: number[];
  /** `file:line`, a binary, or nothing, per name. */
  files: string[];
  /** Four numbers a node, in pre-order: level, total, self, name. */
  rows: number[];
}

/** What is known of the functions, shared by all trees that are derived from one answer. */
export interface Functions {
  readonly names: readonly string[];
  readonly kinds: Uint8Array;
  readonly files: readonly string[];
}

const ROW = 4;
export const ROOT = 0;

/** What one node says; `total` includes its children, `self` does not. */
export interface Node {
  readonly level: number;
  readonly total: number;
  readonly self: number;
  readonly name: number;
}

/**
 * A call tree as columns, one entry per node in pre-order, so that the nodes below `i` are `i + 1 .. end[i]`:
 * ```
 * node   0     1    2     3
 * name   total main parse render      main covers [0, 8), parse [0, 5), render [5, 8)
 * level  0     1    2     2
 * end    4     4    3     4
 * ```
 */
export class FrameTree {
  readonly functions: Functions;
  readonly length: number;
  readonly level: Uint16Array;
  readonly total: Float64Array;
  readonly self: Float64Array;
  /** Index into `functions`. */
  readonly name: Uint32Array;
  /** Where the node's left edge lies, in the unit of `total`. */
  readonly start: Float64Array;
  /** The node's caller; the root's is itself. */
  readonly parent: Uint32Array;
  /** One past the node's last descendant. */
  readonly end: Uint32Array;
  /** Hash of the names from the root to here: names a node across answers. */
  readonly path: Uint32Array;

  /** Takes nodes in pre-order, the root first; throws `RangeError` when they are no tree. */
  constructor(functions: Functions, nodes: readonly Node[]) {
    const length = nodes.length;
    this.functions = functions;
    this.length = length;
    this.level = new Uint16Array(length);
    this.total = new Float64Array(length);
    this.self = new Float64Array(length);
    this.name = new Uint32Array(length);
    this.start = new Float64Array(length);
    this.parent = new Uint32Array(length);
    this.end = new Uint32Array(length);
    this.path = new Uint32Array(length);
    this.fill(nodes);
  }

  static decode(raw: RawTree): FrameTree {
    // Nothing in the range may come as no rows at all.
    const names = raw.names.length === 0 ? ["total"] : raw.names;
    const rows = raw.rows.length === 0 ? [0, 0, 0, 0] : raw.rows;
    if (rows.length % ROW !== 0) throw new RangeError(`${rows.length} numbers are no rows`);
    const nodes: Node[] = [];
    for (let at = 0; at < rows.length; at += ROW) {
      nodes.push({ level: rows[at]!, total: rows[at + 1]!, self: rows[at + 2]!, name: rows[at + 3]! });
    }
    const functions: Functions = {
      names,
      kinds: Uint8Array.from(names, (_, index) => kindOf(raw.kinds[index] ?? 0)),
      files: names.map((_, index) => raw.files[index] ?? ""),
    };
    return new FrameTree(functions, nodes);
  }

  nameOf(node: number): string {
    return this.functions.names[this.name[node]!]!;
  }

  fileOf(node: number): string {
    return this.functions.files[this.name[node]!]!;
  }

  kindOf(node: number): number {
    return this.functions.kinds[this.name[node]!]!;
  }

  /** The node with this path hash, or the root. */
  find(path: string): number {
    const wanted = Number.parseInt(path, 16);
    return Math.max(ROOT, this.path.indexOf(wanted));
  }

  /** The path hash as `find` takes it; empty for the root. */
  pathOf(node: number): string {
    return node === ROOT ? "" : this.path[node]!.toString(16).padStart(8, "0");
  }

  firstChild(node: number): number | undefined {
    return node + 1 < this.end[node]! ? node + 1 : undefined;
  }

  nextSibling(node: number): number | undefined {
    const next = this.end[node]!;
    return node !== ROOT && next < this.end[this.parent[node]!]! ? next : undefined;
  }

  previousSibling(node: number): number | undefined {
    let child = node === ROOT ? undefined : this.firstChild(this.parent[node]!);
    while (child !== undefined && child < node && this.end[child]! !== node) child = this.nextSibling(child);
    return child !== undefined && child < node ? child : undefined;
  }

  /** The node at `level` that covers `value` on the horizontal axis. */
  at(level: number, value: number): number | undefined {
    let node: number | undefined = ROOT;
    while (node !== undefined && !this.covers(node, value)) node = this.nextSibling(node);
    for (let depth = 0; depth < level && node !== undefined; depth += 1) {
      node = this.firstChild(node);
      while (node !== undefined && !this.covers(node, value)) node = this.nextSibling(node);
    }
    return node;
  }

  /**
   * The topmost nodes with a wanted name, in pre-order. A recursive function's inner calls are left out: their time is
   * already in the outer one's total.
   */
  *outermost(wanted: (name: number) => boolean): Generator<number> {
    for (let node = 0; node < this.length;) {
      if (wanted(this.name[node]!)) {
        yield node;
        node = this.end[node]!;
      } else {
        node += 1;
      }
    }
  }

  private covers(node: number, value: number): boolean {
    const left = this.start[node]!;
    return left <= value && value < left + this.total[node]!;
  }

  private fill(nodes: readonly Node[]): void {
    const open: number[] = [];
    const filled = new Float64Array(nodes.length);
    nodes.forEach((node, index) => {
      this.check(node, index, open.length);
      while (open.length > node.level) this.end[open.pop()!] = index;
      const parent = open[open.length - 1];
      this.level[index] = node.level;
      this.total[index] = node.total;
      this.self[index] = node.self;
      this.name[index] = node.name;
      this.parent[index] = parent ?? ROOT;
      this.path[index] = extendPath(parent === undefined ? 0 : this.path[parent]!, this.nameOf(index));
      if (parent !== undefined) {
        this.start[index] = this.start[parent]! + filled[parent]!;
        filled[parent]! += node.total;
      }
      open.push(index);
    });
    for (const node of open) this.end[node] = nodes.length;
  }

  private check(node: Node, index: number, open: number): void {
    const levelFits = index === 0 ? node.level === 0 : 1 <= node.level && node.level <= open;
    if (!levelFits)
      throw new RangeError(`node ${index} is at level ${node.level}, below none at level ${open - 1}`);
    if (!(node.name in this.functions.names)) throw new RangeError(`node ${index} has no name ${node.name}`);
    if (!(node.total >= 0)) throw new RangeError(`node ${index} has a total of ${node.total}`);
  }
}

/** FNV-1a over the UTF-16 units of the text. */
export function hash(text: string, seed = 0x811c9dc5): number {
  let value = seed;
  for (let at = 0; at < text.length; at += 1) {
    value = Math.imul(value ^ text.charCodeAt(at), 0x01000193);
  }
  return value >>> 0;
}

function extendPath(parent: number, name: string): number {
  return hash(name, hash("/", parent));
}
