import { FRAME_KINDS } from "./kind.ts";
import { hash, type Functions } from "./tree.ts";

export type Scheme = "light" | "dark";

type KindName = (typeof FRAME_KINDS)[number]["name"];

interface Family {
  /** Hue in degrees of OKLCH, and how far the shades of one family spread to each side. */
  readonly hue: number;
  readonly spread: number;
  readonly chroma: number;
  /** Added to the scheme's lightness, so that families differ without hue as well. */
  readonly lighter: number;
}

// Neighbors in hue differ in lightness: orange and yellow, blue and purple stay apart for color-blind eyes too.
const FAMILIES: Record<KindName, Family> = {
  other: { hue: 260, spread: 0, chroma: 0.015, lighter: -0.01 },
  native: { hue: 66, spread: 14, chroma: 0.105, lighter: 0 },
  kernel: { hue: 250, spread: 8, chroma: 0.115, lighter: -0.08 },
  jit: { hue: 312, spread: 6, chroma: 0.085, lighter: 0.06 },
  go: { hue: 195, spread: 10, chroma: 0.085, lighter: 0.01 },
  python: { hue: 105, spread: 6, chroma: 0.12, lighter: 0.05 },
  jvm: { hue: 18, spread: 8, chroma: 0.11, lighter: -0.05 },
  v8: { hue: 150, spread: 10, chroma: 0.095, lighter: 0.02 },
  marker: { hue: 0, spread: 0, chroma: 0, lighter: -0.04 },
};

/** Lightness of boxes; text on them is near black on light ones and near white on dark ones. */
const LIGHTNESS: Record<Scheme, number> = { light: 0.83, dark: 0.48 };

/** Lightness, chroma, and hue in degrees, as CSS `oklch()` takes them. */
export interface Oklch {
  readonly lightness: number;
  readonly chroma: number;
  readonly hue: number;
}

/** A kind's color; `shade` from -1 to 1 picks one of its family. */
export function kindColor(kind: number, shade: number, scheme: Scheme): Oklch {
  const { hue, spread, chroma, lighter } = FAMILIES[FRAME_KINDS[kind]!.name];
  return {
    lightness: LIGHTNESS[scheme] + lighter + 0.02 * shade,
    chroma,
    hue: (hue + spread * shade + 360) % 360,
  };
}

export function css({ lightness, chroma, hue }: Oklch): string {
  return `oklch(${lightness.toFixed(3)} ${chroma.toFixed(3)} ${hue.toFixed(1)})`;
}

/** Where a function comes from: its binary, or the directory of its source file. Same origin, same shade. */
export function originOf(file: string): string {
  const path = file.replace(/:\d+$/, "");
  const slash = path.lastIndexOf("/");
  return path === file || slash < 0 ? path : path.slice(0, slash);
}

const SHADES = 9;

/** One of nine shades from -1 to 1, the same for the same origin at any time and place. */
export function shadeOf(origin: string): number {
  return ((hash(origin) >>> 7) % SHADES) / ((SHADES - 1) / 2) - 1;
}

/** A CSS color per function. */
export function functionColors(functions: Functions, scheme: Scheme): string[] {
  return functions.files.map((file, name) =>
    css(kindColor(functions.kinds[name]!, shadeOf(originOf(file)), scheme)),
  );
}
