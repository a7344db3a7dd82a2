import type { Functions } from "./tree.ts";

/** What a search text means for the functions of a tree. */
export interface Matches {
  /** 1 per function that matches. */
  readonly byName: Uint8Array;
  /** How many match. */
  readonly count: number;
}

/** Capitals in the text make the search sensitive to them. Throws `SyntaxError` for what is no regular expression. */
export function compile(text: string): RegExp {
  return new RegExp(text, /[A-Z]/.test(text) ? "" : "i");
}

/** Why a text is no regular expression, in the browser's words; `undefined` when it is one. */
export function patternError(text: string): string | undefined {
  try {
    compile(text);
    return undefined;
  } catch (error) {
    return error instanceof Error ? error.message : String(error);
  }
}

/** Functions whose name matches; `undefined` for an empty text and for what is no regular expression. */
export function search(functions: Functions, text: string): Matches | undefined {
  if (text === "" || patternError(text) !== undefined) return undefined;
  const pattern = compile(text);
  const byName = Uint8Array.from(functions.names, (name) => Number(pattern.test(name)));
  return { byName, count: byName.reduce((sum, one) => sum + one, 0) };
}

/** The pattern that matches exactly this name. */
export function exactly(name: string): string {
  return `^${name.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&")}$`;
}
