import { fetchBinaries, type ApiError, type Binaries, type Binary, type Selection } from "./api.ts";
import { byId, h } from "./dom.ts";
import { percent, plural, quantity } from "./format.ts";

/** How well the code of each binary unwinds and is named. Asked for only while it is shown. */
export class BinaryTable {
  private readonly body = byId("binaries-body", HTMLTableSectionElement);
  private readonly note = byId("binaries-note", HTMLElement);
  private readonly failed: (error: ApiError) => void;
  private running = new AbortController();

  constructor(failed: (error: ApiError) => void) {
    this.failed = failed;
  }

  /** Shows the binaries of a selection; a later call wins over one that is still under way. */
  async load(selection: Selection): Promise<void> {
    this.running.abort();
    this.running = new AbortController();
    const { signal } = this.running;
    try {
      const binaries = await fetchBinaries(selection, signal);
      if (!signal.aborted) this.show(binaries);
    } catch (error) {
      if (!signal.aborted) this.failed(error as ApiError);
    }
  }

  private show({ unit, binaries, leftOut }: Binaries): void {
    this.body.replaceChildren(...binaries.map((binary) => row(binary, unit)));
    const more = leftOut > 0 ? `, and ${plural(leftOut, "other")}` : "";
    this.note.textContent = `${plural(binaries.length, "binary", "binaries")}${more}; those that cut the most stacks first.`;
  }
}

function row(binary: Binary, unit: string): HTMLElement {
  const { name, total, truncated, unknownPercent, reason, hint } = binary;
  const cell = (value: number, text: string): HTMLElement =>
    h("td", { class: "value", "data-value": String(value) }, text);
  return h(
    "tr",
    { "data-binary": name },
    h("th", { scope: "row", title: name }, name),
    cell(total, quantity(total, unit)),
    cell(truncated, percent(truncated, total)),
    cell(unknownPercent, percent(unknownPercent, 100)),
    h("td", { class: "reason" }, reason ?? ""),
    h("td", { class: "hint" }, hint ?? ""),
  );
}
