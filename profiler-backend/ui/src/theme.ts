import type { Scheme } from "./flamegraph/color.ts";

const dark = window.matchMedia("(prefers-color-scheme: dark)");

export function scheme(): Scheme {
  return dark.matches ? "dark" : "light";
}

/** Calls back when the system's color scheme changes: canvases have to be drawn again. */
export function onSchemeChange(changed: () => void): void {
  dark.addEventListener("change", changed);
}

/** A color of `style.css`, for use on a canvas. */
export function variable(name: string): string {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}
