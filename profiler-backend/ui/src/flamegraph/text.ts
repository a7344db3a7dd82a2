const ELLIPSIS = "…";

/** Cuts labels to a width by adding up character widths, each measured once: much cheaper than measuring every label. */
export class TextFitter {
  private readonly widths = new Map<string, number>();
  private readonly measure: (text: string) => number;

  constructor(measure: (text: string) => number) {
    this.measure = measure;
  }

  /** The text, or as much of its beginning as fits together with an ellipsis; empty when not even one character does. */
  fit(text: string, width: number): string {
    const room = width - this.widthOf(ELLIPSIS);
    let [used, kept, at] = [0, 0, 0];
    for (const character of text) {
      used += this.widthOf(character);
      at += character.length;
      if (used <= room) kept = at;
      if (used > width) return kept === 0 ? "" : text.slice(0, kept) + ELLIPSIS;
    }
    return text;
  }

  private widthOf(character: string): number {
    let width = this.widths.get(character);
    if (width === undefined) {
      width = this.measure(character);
      this.widths.set(character, width);
    }
    return width;
  }
}
