import type { Line } from "./api.ts";

/** Lines beyond these are drawn as one. */
const LINES_MAX = 7;
const MINUTE_MS = 60_000;

/** The bars of the timeline: one stack per step, largest line at the bottom. */
export interface Stacks {
  readonly lines: readonly Line[];
  readonly totals: readonly number[];
  readonly peak: number;
}

/** Largest lines first, all beyond the seventh as one. */
export function stack(lines: readonly Line[]): Stacks {
  const sum = (values: readonly number[]): number => values.reduce((total, value) => total + value, 0);
  const add = (a: readonly number[], b: readonly number[]): number[] =>
    Array.from({ length: Math.max(a.length, b.length) }, (_, step) => (a[step] ?? 0) + (b[step] ?? 0));
  const sorted = [...lines].sort((a, b) => sum(b.values) - sum(a.values));
  const rest = sorted.slice(LINES_MAX);
  const shown = sorted.slice(0, LINES_MAX);
  if (rest.length > 0) {
    shown.push({ name: `${rest.length} others`, values: rest.map(({ values }) => values).reduce(add) });
  }
  const totals = shown.map(({ values }) => values).reduce<number[]>(add, []);
  return { lines: shown, totals, peak: totals.reduce((peak, total) => Math.max(peak, total), 0) };
}

const TICKS_S = [10, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10_800, 21_600, 43_200, 86_400];

/** Distance of the time marks: about 90 px each. */
export function tickMs(totalMs: number, width: number): number {
  const wanted = totalMs / 1000 / Math.max(1, width / 90);
  return (TICKS_S.find((tick) => tick >= wanted) ?? Math.ceil(wanted / 86_400) * 86_400) * 1000;
}

/** The first full tick of local time at or after `startMs`. */
export function firstTick(startMs: number, tick: number): number {
  const zone = new Date(startMs).getTimezoneOffset() * MINUTE_MS;
  return Math.ceil((startMs - zone) / tick) * tick + zone;
}
