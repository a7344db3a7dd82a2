import assert from "node:assert/strict";
import { test } from "node:test";
import { clock, cores, percent, plural, quantity, span, stepValue } from "../src/format.ts";
import { compile, exactly, patternError, search } from "../src/flamegraph/search.ts";
import { TextFitter } from "../src/flamegraph/text.ts";
import { instant, stepMs } from "../src/time.ts";
import { formatSelector, parseSelector, SelectorError } from "../src/selector.ts";
import { DEFAULTS, formatState, parseState } from "../src/state.ts";
import { stack, tickMs } from "../src/stacks.ts";

test("quantities have three digits and the largest unit that fits", () => {
  assert.equal(quantity(1_250_000_000, "nanoseconds"), "1.25 s");
  assert.equal(quantity(90e9, "nanoseconds"), "1.50 min");
  assert.equal(quantity(999, "nanoseconds"), "999 ns");
  assert.equal(quantity(0, "nanoseconds"), "0 s");
  assert.equal(quantity(3.4 * 2 ** 20, "bytes"), "3.40 MiB");
  assert.equal(quantity(12_000, "count"), "12.0 k");
  assert.equal(quantity(7, "count"), "7");
  assert.equal(quantity(1500, "cycles"), "1.50 k cycles");
});

test("nanoseconds per second are cores, other deltas rates, snapshots themselves", () => {
  assert.equal(stepValue(5e9, "nanoseconds", 10_000, true), "0.500 cores");
  assert.equal(stepValue(2 ** 20 * 10, "bytes", 10_000, true), "1.00 MiB/s");
  assert.equal(stepValue(2 ** 20, "bytes", 10_000, false), "1.00 MiB");
  assert.equal(cores(0), "0 cores");
});

test("shares are exact where they are small", () => {
  assert.equal(percent(1, 3), "33.3 %");
  assert.equal(percent(1, 30), "3.33 %");
  assert.equal(percent(1, 1e9), "<0.01 %");
  assert.equal(percent(5, 5), "100 %");
  assert.equal(percent(0, 0), "0 %");
});

test("counts and spans read as words", () => {
  assert.equal(plural(1, "profile"), "1 profile");
  assert.equal(plural(2500, "profile"), "2,500 profiles");
  assert.equal(plural(2, "binary", "binaries"), "2 binaries");
  assert.equal(span(90_000), "1 m 30 s");
  assert.equal(span(86_400_000), "1 d");
  assert.equal(clock(new Date(2026, 0, 2, 3, 4, 5).getTime()), "03:04:05");
  assert.equal(clock(new Date(2026, 0, 2, 3, 4, 0).getTime(), true), "03:04");
});

test("a selector survives being written and read", () => {
  const matchers = [
    { label: "container", operator: "=", value: 'a "b" \\ c\n' },
    { label: "comm", operator: "!~", value: "worker.*" },
  ] as const;
  assert.deepEqual(parseSelector(formatSelector(matchers)), matchers);
});

test("empty selectors select everything", () => {
  for (const text of ["", "  ", "{}", "{ }"]) assert.deepEqual(parseSelector(text), []);
  assert.equal(formatSelector([]), "");
});

test("a wrong selector is refused where it is wrong", () => {
  const positions = {
    "{a=1}": 3,
    "{a}": 2,
    '{a="x"': 6,
    '{a="x" b="y"}': 7,
    '{"a"="x"}': 1,
    '{a="x"} y': 8,
    '{a="x': 5,
    '{a="\\q"}': 5,
  };
  for (const [text, position] of Object.entries(positions)) {
    assert.throws(
      () => parseSelector(text),
      (error) => error instanceof SelectorError && error.position === position,
      text,
    );
  }
});

test("the address holds only what differs from the defaults", () => {
  assert.equal(formatState(DEFAULTS), "");
  const state = { ...DEFAULTS, query: '{comm="a&b"}', live: false, view: "table", zoom: "0badcafe" } as const;
  assert.deepEqual(parseState(formatState(state)), state);
  assert.deepEqual(parseState("?view=nonsense&other=1"), DEFAULTS);
});

test("capitals make a search sensitive to them", () => {
  assert.ok(compile("main").test("Main"));
  assert.ok(!compile("Main").test("main"));
  assert.equal(patternError("a|b"), undefined);
  assert.match(patternError("(") ?? "", /group/i);
});

test("an exact pattern matches its name alone, whatever is in it", () => {
  const names = ["main", "main2", "core::ops::{{closure}}", "[unknown]", "operator()(int*)", "a+b?c"];
  const functions = { names, kinds: new Uint8Array(names.length), files: names };
  for (const name of names) {
    const matches = search(functions, exactly(name));
    assert.deepEqual(
      names.filter((_, index) => matches?.byName[index] === 1),
      [name],
    );
  }
});

test("labels are cut at the right end, by character", () => {
  const fitter = new TextFitter((text) => text.length);
  assert.equal(fitter.fit("function", 8), "function");
  assert.equal(fitter.fit("function", 5), "func…");
  assert.equal(fitter.fit("function", 1), "");
  assert.equal(new TextFitter(() => 1).fit("a😀bcd", 3), "a😀…");
});

test("times of the state are understood as the backend understands them", () => {
  const now = 1_000_000_000;
  assert.equal(instant("now", now), now);
  assert.equal(instant("now-15m", now), now - 900_000);
  assert.equal(instant("now-1h30m", now), now - 5_400_000);
  assert.equal(instant("12345", now), 12_345);
  assert.equal(instant("1970-01-01T00:00:01Z", now), 1000);
});

test("steps are no finer than a window and no more than fit", () => {
  assert.equal(stepMs({ from: "now-5m", to: "now" }, 0), 10_000);
  assert.equal(stepMs({ from: "now-1h", to: "now" }, 0), 20_000);
  assert.equal(stepMs({ from: "now-24h", to: "now" }, 0), 600_000);
});

test("lines beyond the seventh are drawn as one, and totals stay", () => {
  const lines = Array.from({ length: 10 }, (_, index) => ({ name: `n${index}`, values: [index, 1] }));
  const { lines: shown, totals, peak } = stack(lines);
  assert.deepEqual(
    shown.map(({ name }) => name),
    ["n9", "n8", "n7", "n6", "n5", "n4", "n3", "3 others"],
  );
  assert.deepEqual(totals, [45, 10]);
  assert.equal(peak, 45);
  assert.deepEqual(stack([]), { lines: [], totals: [], peak: 0 });
});

test("time marks are about 90 pixels apart", () => {
  assert.equal(tickMs(900_000, 1400), 60_000);
  assert.equal(tickMs(86_400_000, 700), 21_600_000);
});
