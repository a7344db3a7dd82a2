import assert from "node:assert/strict";
import { test } from "node:test";
import { calleesOf, callersOf, focusOn, functionTotals, matchedTotal } from "../src/flamegraph/derive.ts";
import { neighbor } from "../src/flamegraph/interaction.ts";
import { layout, rangeOf } from "../src/flamegraph/layout.ts";
import { FrameTree } from "../src/flamegraph/tree.ts";

/** One line per node, indented by level: `name total self`. */
function tree(text: string): FrameTree {
  const lines = text.split("\n").filter((line) => line.trim() !== "");
  const indent = lines[0]!.search(/\S/);
  const names: string[] = [];
  const rows = lines.flatMap((line) => {
    const [name, total, self] = line.trim().split(" ");
    if (!names.includes(name!)) names.push(name!);
    return [(line.search(/\S/) - indent) / 2, Number(total), Number(self), names.indexOf(name!)];
  });
  return FrameTree.decode({ names, rows, kinds: names.map(() => 1), files: names.map(() => "") });
}

function text(shown: FrameTree): string {
  return Array.from({ length: shown.length }, (_, node) => {
    const indent = "  ".repeat(shown.level[node]!);
    return `${indent}${shown.nameOf(node)} ${shown.total[node]!} ${shown.self[node]!}`;
  }).join("\n");
}

function sameTree(actual: FrameTree, expected: string): void {
  assert.equal(text(actual), text(tree(expected)));
}

const SAMPLE = `
total 100 0
  main 90 10
    parse 50 20
      read 30 5
        parse 25 25
    draw 30 30
  idle 10 0
    parse 10 10
`;
const id = (shown: FrameTree, name: string): number => shown.functions.names.indexOf(name);
const named = (shown: FrameTree, name: string) => (found: number) => shown.functions.names[found] === name;

test("nodes know their edges, parents and ends", () => {
  const shown = tree(SAMPLE);
  assert.deepEqual([...shown.start], [0, 0, 0, 0, 0, 50, 90, 90]);
  assert.deepEqual([...shown.parent], [0, 0, 1, 2, 3, 1, 0, 6]);
  assert.deepEqual([...shown.end], [8, 6, 5, 5, 5, 6, 8, 8]);
});

test("rows that are no tree are refused", () => {
  const decode = (rows: number[]) => () =>
    FrameTree.decode({ names: ["total", "a"], kinds: [0, 1], files: ["", ""], rows });
  assert.throws(decode([0, 1, 0, 0, 2, 1, 1, 1]), /node 1 is at level 2/);
  assert.throws(decode([1, 1, 0, 0]), /node 0 is at level 1/);
  assert.throws(decode([0, 1, 0, 0, 0, 1, 1, 1]), /node 1 is at level 0/);
  assert.throws(decode([0, 1, 0, 2]), /no name 2/);
  assert.throws(decode([0, -1, 0, 0]), /total of -1/);
  assert.throws(decode([0, 1, 0]), /3 numbers/);
});

test("an answer without rows is an empty root", () => {
  sameTree(FrameTree.decode({ names: [], kinds: [], files: [], rows: [] }), "total 0 0");
});

test("a path names the same node in another answer, and the root when it is gone", () => {
  const before = tree(SAMPLE);
  const after = tree(`
total 7 0
  other 4 4
  main 3 0
    draw 3 3
`);
  assert.equal(after.nameOf(after.find(before.pathOf(5))), "draw");
  assert.equal(after.find(before.pathOf(3)), 0);
  assert.equal(before.pathOf(0), "");
  assert.equal(before.find(""), 0);
});

test("a point lies in the node that covers it", () => {
  const shown = tree(SAMPLE);
  assert.equal(shown.at(2, 60), 5);
  assert.equal(shown.at(4, 24.9), 4);
  assert.equal(shown.at(4, 25), undefined);
  assert.equal(shown.at(2, 85), undefined);
  assert.equal(shown.at(0, 100), undefined);
});

test("arrow keys walk to parents, children and siblings, mirrored where callers are above", () => {
  const shown = tree(SAMPLE);
  assert.equal(neighbor(shown, "ArrowDown", 1, false), 2);
  assert.equal(neighbor(shown, "ArrowUp", 1, true), 2);
  assert.equal(neighbor(shown, "ArrowRight", 2, false), 5);
  assert.equal(neighbor(shown, "ArrowLeft", 5, false), 2);
  assert.equal(neighbor(shown, "ArrowLeft", 2, false), undefined);
  assert.equal(neighbor(shown, "ArrowUp", 0, false), undefined);
  assert.equal(neighbor(shown, "a", 2, false), null);
});

test("recursion counts once in a total and fully in self", () => {
  const shown = tree(SAMPLE);
  const parse = functionTotals(shown, 1).find(({ name }) => name === id(shown, "parse"));
  assert.deepEqual(parse, { name: id(shown, "parse"), total: 60, self: 55 });
  assert.equal(functionTotals(shown, 1).length, 5);
  assert.equal(
    functionTotals(shown, 2).find(({ name }) => name === id(shown, "main")),
    undefined,
  );
});

test("matched time counts a stack once", () => {
  const shown = tree(SAMPLE);
  const wanted = [id(shown, "parse"), id(shown, "read")];
  assert.equal(
    matchedTotal(shown, (name) => wanted.includes(name)),
    60,
  );
});

test("focus keeps the stacks through a function and their callers", () => {
  const shown = tree(SAMPLE);
  sameTree(
    focusOn(shown, named(shown, "parse")),
    `
total 60 0
  main 50 0
    parse 50 20
      read 30 5
        parse 25 25
  idle 10 0
    parse 10 10
`,
  );
});

test("callees of all call sites are merged", () => {
  const shown = tree(SAMPLE);
  sameTree(
    calleesOf(shown, id(shown, "parse"), named(shown, "parse")),
    `
parse 60 30
  read 30 5
    parse 25 25
`,
  );
});

test("callers are inverted, nearest first", () => {
  const shown = tree(SAMPLE);
  sameTree(
    callersOf(shown, id(shown, "read"), named(shown, "read")),
    `
read 30 0
  parse 30 0
    main 30 30
`,
  );
  sameTree(
    callersOf(shown, id(shown, "parse"), named(shown, "parse")),
    `
parse 60 0
  main 50 50
  idle 10 10
`,
  );
});

test("boxes lie inside the width, and what is too narrow is left out with all below it", () => {
  const shown = tree(`
total 1000 0
  wide 999 0
    wider 999 999
  narrow 1 0
    narrower 1 1
`);
  const boxes = layout(shown, rangeOf(shown, 0), 400);
  assert.deepEqual([...boxes.node.subarray(0, boxes.count)], [0, 1, 2]);
  assert.equal(boxes.deepest, 2);
});

test("zoomed, callers fill the width and siblings are gone", () => {
  const shown = tree(SAMPLE);
  const boxes = layout(shown, rangeOf(shown, 5), 300);
  assert.deepEqual([...boxes.node.subarray(0, boxes.count)], [0, 1, 5]);
  assert.deepEqual([...boxes.left.subarray(0, boxes.count)], [0, 0, 0]);
  assert.deepEqual([...boxes.width.subarray(0, boxes.count)], [300, 300, 300]);
});

test("an empty tree has no boxes", () => {
  const shown = tree("total 0 0");
  assert.equal(layout(shown, rangeOf(shown, 0), 300).count, 0);
});
