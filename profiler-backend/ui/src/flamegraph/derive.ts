import { FrameTree, ROOT, type Functions, type Node } from "./tree.ts";

/** A tree under construction: paths are added in any order, equal ones fall together. */
class Builder {
  private readonly root: Branch;
  private readonly functions: Functions;

  constructor(functions: Functions, rootName: number) {
    this.functions = functions;
    this.root = new Branch(rootName);
  }

  /** Adds a path of names below the root, of which each carries `total`; returns its end. */
  addPath(names: Iterable<number>, total: number): Branch {
    let branch = this.root;
    branch.total += total;
    for (const name of names) {
      branch = branch.child(name);
      branch.total += total;
    }
    return branch;
  }

  /** Adds all that is below `node` to `branch`, and the node's own value. */
  graft(branch: Branch, tree: FrameTree, node: number): void {
    const open = [branch];
    const base = tree.level[node]!;
    branch.self += tree.self[node]!;
    for (let at = node + 1; at < tree.end[node]!; at += 1) {
      const depth = tree.level[at]! - base;
      const child = open[depth - 1]!.child(tree.name[at]!);
      child.total += tree.total[at]!;
      child.self += tree.self[at]!;
      open[depth] = child;
    }
  }

  build(): FrameTree {
    const nodes: Node[] = [];
    const open: [level: number, branch: Branch][] = [[0, this.root]];
    for (let next = open.pop(); next; next = open.pop()) {
      const [level, branch] = next;
      nodes.push({ level, total: branch.total, self: branch.self, name: branch.name });
      // The smallest goes on the stack first, so that the largest comes off first.
      const children = [...branch.children.values()].sort((a, b) => a.total - b.total);
      for (const child of children) open.push([level + 1, child]);
    }
    return new FrameTree(this.functions, nodes);
  }
}

class Branch {
  readonly name: number;
  readonly children = new Map<number, Branch>();
  total = 0;
  self = 0;

  constructor(name: number) {
    this.name = name;
  }

  child(name: number): Branch {
    let child = this.children.get(name);
    if (!child) {
      child = new Branch(name);
      this.children.set(name, child);
    }
    return child;
  }
}

/** Picks functions by their index in `Functions`. */
export type Wanted = (name: number) => boolean;

/** Names of the callers of `node`, nearest first, without the root: it is no function. */
function callerNames(tree: FrameTree, node: number): number[] {
  const names: number[] = [];
  for (let at = tree.parent[node]!; at !== ROOT; at = tree.parent[at]!) names.push(tree.name[at]!);
  return names;
}

/** Only the stacks that go through a wanted function, with their callers; the root's total is theirs. */
export function focusOn(tree: FrameTree, wanted: Wanted): FrameTree {
  const builder = new Builder(tree.functions, tree.name[ROOT]!);
  for (const node of tree.outermost(wanted)) {
    const path = [...callerNames(tree, node).reverse(), tree.name[node]!];
    builder.graft(builder.addPath(path, tree.total[node]!), tree, node);
  }
  return builder.build();
}

/** All that the wanted functions call, from all places they are called from; the root stands for them and has the name `root`. */
export function calleesOf(tree: FrameTree, root: number, wanted: Wanted): FrameTree {
  const builder = new Builder(tree.functions, root);
  for (const node of tree.outermost(wanted)) {
    builder.graft(builder.addPath([], tree.total[node]!), tree, node);
  }
  return builder.build();
}

/** All that calls the wanted functions, inverted: below the root, which is named `root`, are their callers, below them theirs. */
export function callersOf(tree: FrameTree, root: number, wanted: Wanted): FrameTree {
  const builder = new Builder(tree.functions, root);
  for (const node of tree.outermost(wanted)) {
    const last = builder.addPath(callerNames(tree, node), tree.total[node]!);
    last.self += tree.total[node]!;
  }
  return builder.build();
}

/** One function's part of a tree. */
export interface FunctionTotal {
  readonly name: number;
  readonly self: number;
  /** Recursion counted once. */
  readonly total: number;
}

/** Self and total of each function that has a node at `firstLevel` or below: above are the root and groups, no functions. */
export function functionTotals(tree: FrameTree, firstLevel: number): FunctionTotal[] {
  const count = tree.functions.names.length;
  const self = new Float64Array(count);
  const total = new Float64Array(count);
  // For each name, the end of its outermost node that is still open: what lies before it is recursion.
  const openUntil = new Uint32Array(count);
  const present = new Set<number>();
  for (let node = ROOT; node < tree.length; node += 1) {
    const name = tree.name[node]!;
    if (tree.level[node]! < firstLevel) continue;
    present.add(name);
    self[name]! += tree.self[node]!;
    if (node < openUntil[name]!) continue;
    total[name]! += tree.total[node]!;
    openUntil[name] = tree.end[node]!;
  }
  return [...present].map((name) => ({ name, self: self[name]!, total: total[name]! }));
}

/** Total of all stacks that have a wanted name in them. */
export function matchedTotal(tree: FrameTree, wanted: Wanted): number {
  let sum = 0;
  for (const node of tree.outermost(wanted)) sum += tree.total[node]!;
  return sum;
}
