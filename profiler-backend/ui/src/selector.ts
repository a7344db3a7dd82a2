/** A label selector as the backend reads it: `{container="x",comm=~"worker.*"}`. */
export type Operator = "=" | "!=" | "=~" | "!~";

export interface Matcher {
  readonly label: string;
  readonly operator: Operator;
  readonly value: string;
}

/** In the order in which a click on a filter walks through them. */
export const OPERATORS: readonly Operator[] = ["=", "!=", "=~", "!~"];

const MEANINGS: Record<Operator, string> = {
  "=": "is",
  "!=": "is not",
  "=~": "matches",
  "!~": "does not match",
};

/** The operator as words, for those who do not see the sign. */
export function meaning(operator: Operator): string {
  return MEANINGS[operator];
}

/** The text is no selector; `position` counts characters from 0. */
export class SelectorError extends Error {
  readonly position: number;

  constructor(what: string, position: number) {
    super(`${what} at character ${position + 1}`);
    this.position = position;
  }
}

/** Reads a selector; an empty text and `{}` select everything. Throws `SelectorError`. */
export function parseSelector(text: string): Matcher[] {
  return new Parser(text).selector();
}

/** Writes a selector that `parseSelector` and the backend read back; no matcher gives the empty text. */
export function formatSelector(matchers: readonly Matcher[]): string {
  if (matchers.length === 0) return "";
  const parts = matchers.map(({ label, operator, value }) => `${label}${operator}${quote(value)}`);
  return `{${parts.join(",")}}`;
}

function quote(value: string): string {
  const escaped = value.replace(/[\\"\n\t\r]/g, (found) => {
    switch (found) {
      case "\n":
        return "\\n";
      case "\t":
        return "\\t";
      case "\r":
        return "\\r";
      default:
        return `\\${found}`;
    }
  });
  return `"${escaped}"`;
}

const ESCAPES: Readonly<Record<string, string>> = { "\\": "\\", '"': '"', n: "\n", t: "\t", r: "\r" };

class Parser {
  private at = 0;
  private readonly text: string;

  constructor(text: string) {
    this.text = text;
  }

  selector(): Matcher[] {
    const braced = this.skip("{");
    const matchers: Matcher[] = [];
    while (!this.atEnd(braced)) {
      matchers.push(this.matcher());
      if (!this.skip(",")) break;
    }
    if (braced && !this.skip("}")) throw this.error('expected "," or "}"');
    if (this.peek() !== "") throw this.error(`unexpected ${JSON.stringify(this.peek())}`);
    return matchers;
  }

  private atEnd(braced: boolean): boolean {
    return this.peek() === "" || (braced && this.peek() === "}");
  }

  private matcher(): Matcher {
    return { label: this.label(), operator: this.operator(), value: this.value() };
  }

  private label(): string {
    this.peek();
    const found = /^[a-zA-Z_][a-zA-Z0-9_]*/.exec(this.text.slice(this.at));
    if (!found) throw this.error("expected a label name");
    this.at += found[0].length;
    return found[0];
  }

  private operator(): Operator {
    // Two-character operators first, because "=" is a prefix of "=~".
    for (const operator of ["=~", "!~", "!=", "="] as const) {
      if (this.skip(operator)) return operator;
    }
    throw this.error("expected =, !=, =~ or !~");
  }

  private value(): string {
    if (!this.skip('"')) throw this.error("expected a value in double quotes");
    let value = "";
    for (;;) {
      const next = this.text[this.at];
      if (next === undefined) throw this.error("unterminated value");
      this.at += 1;
      if (next === '"') return value;
      value += next === "\\" ? this.escape() : next;
    }
  }

  private escape(): string {
    const meant = ESCAPES[this.text[this.at] ?? ""];
    if (meant === undefined) throw this.error("unknown escape");
    this.at += 1;
    return meant;
  }

  /** The next character that is not a space, or the empty string at the end. */
  private peek(): string {
    while (/\s/.test(this.text[this.at] ?? "")) this.at += 1;
    return this.text[this.at] ?? "";
  }

  private skip(token: string): boolean {
    this.peek();
    if (!this.text.startsWith(token, this.at)) return false;
    this.at += token.length;
    return true;
  }

  private error(what: string): SelectorError {
    return new SelectorError(what, this.at);
  }
}
