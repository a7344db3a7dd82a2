import type { State } from "./state.ts";

export type Times = Pick<State, "from" | "to">;

const STEPS_S = [10, 20, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21_600, 86_400];
const BARS_MAX = 180;
const UNITS_MS: Readonly<Record<string, number>> = { s: 1000, m: 60_000, h: 3_600_000, d: 86_400_000 };

/** A time of the state as Unix ms; one in a form that only the backend knows counts as now. */
export function instant(text: string, now: number): number {
  if (/^\d+$/.test(text)) return Number(text);
  const ago = /^now-((?:\d+[smhd])+)$/.exec(text)?.[1];
  if (ago === undefined) {
    const date = Date.parse(text);
    return Number.isNaN(date) ? now : date;
  }
  const parts = [...ago.matchAll(/(\d+)([smhd])/g)];
  return parts.reduce((at, [, count, unit]) => at - Number(count) * UNITS_MS[unit!]!, now);
}

export function bounds(state: Times, now: number): { from: number; to: number } {
  return { from: instant(state.from, now), to: instant(state.to, now) };
}

/** The finest step that gives at most 180 bars; 10 s is one window of the agent. */
export function stepMs(state: Times, now: number): number {
  const { from, to } = bounds(state, now);
  const seconds = (to - from) / 1000;
  return (STEPS_S.find((step) => seconds / step <= BARS_MAX) ?? Math.ceil(seconds / BARS_MAX)) * 1000;
}
