const NS_PER_S = 1e9;

function significant(value: number, digits = 3): string {
  if (value === 0) return "0";
  const decimals = digits - 1 - Math.floor(Math.log10(Math.abs(value)));
  return value.toFixed(Math.min(6, Math.max(0, decimals)));
}

function scaled(value: number, steps: readonly (readonly [size: number, unit: string])[]): string {
  const [size, unit] = steps.find(([size]) => Math.abs(value) >= size) ?? steps[steps.length - 1]!;
  return `${significant(value / size)} ${unit}`.trimEnd();
}

const DURATIONS = [
  [86_400e9, "d"],
  [3_600e9, "h"],
  [60e9, "min"],
  [NS_PER_S, "s"],
  [1e6, "ms"],
  [1e3, "µs"],
  [1, "ns"],
] as const;

const BYTES = [
  [2 ** 40, "TiB"],
  [2 ** 30, "GiB"],
  [2 ** 20, "MiB"],
  [2 ** 10, "KiB"],
  [1, "B"],
] as const;

const COUNTS = [
  [1e12, "T"],
  [1e9, "G"],
  [1e6, "M"],
  [1e3, "k"],
  [1, ""],
] as const;

/** A value with three significant digits in the largest unit that fits: `1.25 s`, `3.40 MiB`, `12.0 k`. */
export function quantity(value: number, unit: string): string {
  if (value === 0) return unit === "nanoseconds" ? "0 s" : "0";
  switch (unit) {
    case "nanoseconds":
      return scaled(value, DURATIONS);
    case "bytes":
      return scaled(value, BYTES);
    case "count":
      return Number.isInteger(value) && Math.abs(value) < 1000 ? String(value) : scaled(value, COUNTS);
    default:
      return `${scaled(value, COUNTS)} ${unit}`.trimEnd();
  }
}

/**
 * What one step of the timeline says. A delta is a rate: nanoseconds per second are cores, anything else is per second.
 * A snapshot is the value itself.
 */
export function stepValue(value: number, unit: string, stepMs: number, delta: boolean): string {
  if (!delta) return quantity(value, unit);
  const perSecond = (value * 1000) / stepMs;
  if (unit === "nanoseconds") return cores(perSecond / NS_PER_S);
  return `${quantity(perSecond, unit)}/s`;
}

/** CPU time per elapsed time: `0.82 cores`. */
export function cores(value: number): string {
  return `${significant(value)} ${value === 1 ? "core" : "cores"}`;
}

/** A share of a whole as a percentage; nothing of nothing is 0 %. */
export function percent(part: number, whole: number): string {
  const value = whole > 0 ? (100 * part) / whole : 0;
  if (value === 0) return "0 %";
  if (value < 0.01) return "<0.01 %";
  return `${value.toFixed(value < 10 ? 2 : value < 99.95 ? 1 : 0)} %`;
}

/** `1 frame`, `2 frames`; `several` where an s does not do. */
export function plural(count: number, noun: string, several = `${noun}s`): string {
  return `${count.toLocaleString("en-US")} ${count === 1 ? noun : several}`;
}

/** A span of time in whole units: `5 m`, `1 h 30 m`, `2 d`. */
export function span(ms: number): string {
  let seconds = Math.max(1, Math.round(ms / 1000));
  const parts: string[] = [];
  for (const [size, unit] of [
    [86_400, "d"],
    [3_600, "h"],
    [60, "m"],
    [1, "s"],
  ] as const) {
    const count = Math.floor(seconds / size);
    if (count > 0) parts.push(`${count} ${unit}`);
    seconds -= count * size;
  }
  return parts.slice(0, 2).join(" ");
}

const two = (value: number): string => String(value).padStart(2, "0");

/** Local time of day: `09:04:30`, without the seconds when they are zero and `short` is set. */
export function clock(ms: number, short = false): string {
  const at = new Date(ms);
  const minutes = `${two(at.getHours())}:${two(at.getMinutes())}`;
  return short && at.getSeconds() === 0 ? minutes : `${minutes}:${two(at.getSeconds())}`;
}

/** Local date and time as an `<input type="datetime-local">` takes and gives it. */
export function localDateTime(ms: number): string {
  const at = new Date(ms);
  return `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())}T${clock(ms)}`;
}
