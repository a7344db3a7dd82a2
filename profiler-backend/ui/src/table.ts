import { byId, h } from "./dom.ts";
import { percent, plural, quantity } from "./format.ts";
import { css, kindColor, originOf, shadeOf } from "./flamegraph/color.ts";
import { functionTotals, type FunctionTotal } from "./flamegraph/derive.ts";
import { FRAME_KINDS } from "./flamegraph/kind.ts";
import { exactly, type Matches } from "./flamegraph/search.ts";
import { ROOT, type FrameTree } from "./flamegraph/tree.ts";
import { scheme } from "./theme.ts";

type Column = "name" | "self" | "total";

export interface TableEvents {
  /** A row was chosen, or the chosen one given up (`undefined`). */
  choose(name: string | undefined): void;
  menu(name: string, clientX: number, clientY: number): void;
}

/** A tree, and the level at which functions begin in it. */
export interface Content {
  readonly tree: FrameTree;
  readonly firstLevel: number;
}

const ROWS_MAX = 500;

/** Functions by self and total. */
export class TopTable {
  private readonly body = byId("table-body", HTMLTableSectionElement);
  private readonly head = byId("table-head", HTMLTableRowElement);
  private readonly note = byId("table-note", HTMLElement);
  private readonly events: TableEvents;
  private tree: FrameTree | undefined;
  private totals: FunctionTotal[] = [];
  private unit = "";
  private search = "";
  private matches: Matches | undefined;
  private column: Column = "self";
  private ascending = false;

  constructor(events: TableEvents) {
    this.events = events;
    for (const button of this.head.querySelectorAll("button")) {
      button.addEventListener("click", () => this.sortBy(button.dataset["column"] as Column));
    }
  }

  /** Shows the functions of `tree`. A search for one exact name marks its row; any other leaves only the rows that match. */
  show({ tree, firstLevel }: Content, unit: string, search: string, matches: Matches | undefined): void {
    const searched = search !== this.search;
    if (tree !== this.tree) this.totals = functionTotals(tree, firstLevel);
    this.tree = tree;
    this.unit = unit;
    this.search = search;
    this.matches = matches;
    this.draw();
    if (searched) this.body.querySelector("[aria-selected=true]")?.scrollIntoView({ block: "nearest" });
  }

  private sortBy(column: Column): void {
    this.ascending = this.column === column ? !this.ascending : column === "name";
    this.column = column;
    this.draw();
  }

  private draw(): void {
    const { tree } = this;
    if (!tree) return;
    const chosen = this.totals.filter(({ name }) => this.isChosen(tree, name));
    const rows = this.totals.filter(
      ({ name }) => chosen.length > 0 || !this.matches || this.matches.byName[name] === 1,
    );
    rows.sort(order(tree, this.column, this.ascending));
    const shown = rows.slice(0, ROWS_MAX);
    shown.push(...chosen.filter((row) => !shown.includes(row)));
    this.replace(shown.map((row) => this.row(tree, row, chosen.includes(row))));
    this.note.textContent =
      rows.length > ROWS_MAX
        ? `${ROWS_MAX} of ${plural(rows.length, "function")}; search to narrow down.`
        : plural(rows.length, "function");
    this.markSorted();
  }

  /** Puts rows in place of the old ones; the function that has the focus keeps it. */
  private replace(rows: readonly HTMLElement[]): void {
    const focused = this.body.contains(document.activeElement)
      ? document.activeElement?.textContent
      : undefined;
    this.body.replaceChildren(...rows);
    if (focused === undefined) return;
    const buttons = [...this.body.querySelectorAll("button")];
    buttons.find((button) => button.textContent === focused)?.focus({ preventScroll: true });
  }

  private isChosen(tree: FrameTree, name: number): boolean {
    return this.search !== "" && exactly(tree.functions.names[name]!) === this.search;
  }

  private markSorted(): void {
    for (const cell of this.head.cells) {
      const sorted = cell.querySelector("button")?.dataset["column"] === this.column;
      cell.setAttribute("aria-sort", sorted ? (this.ascending ? "ascending" : "descending") : "none");
    }
  }

  private row(tree: FrameTree, { name, self, total }: FunctionTotal, chosen: boolean): HTMLElement {
    const { names, files, kinds } = tree.functions;
    const text = names[name]!;
    const whole = tree.total[ROOT]!;
    const swatch = h("span", { class: "swatch", title: FRAME_KINDS[kinds[name]!]!.label });
    swatch.style.background = css(kindColor(kinds[name]!, shadeOf(originOf(files[name]!)), scheme()));
    return h(
      "tr",
      {
        "aria-selected": String(chosen),
        oncontextmenu: (event: MouseEvent) => {
          event.preventDefault();
          this.events.menu(text, event.clientX, event.clientY);
        },
      },
      h(
        "td",
        { class: "function" },
        swatch,
        h(
          "button",
          {
            type: "button",
            title: files[name] ? `${text}\n${files[name]}` : text,
            onclick: () => this.events.choose(chosen ? undefined : text),
          },
          text,
        ),
      ),
      this.value(self, whole),
      this.value(total, whole),
    );
  }

  private value(value: number, whole: number): HTMLElement {
    const bar = h("span", { class: "share" });
    bar.style.width = `${whole > 0 ? (100 * value) / whole : 0}%`;
    return h(
      "td",
      { class: "value", "data-value": String(value) },
      bar,
      h("span", { class: "quantity" }, quantity(value, this.unit)),
      h("span", { class: "percent" }, percent(value, whole)),
    );
  }
}

function order(
  tree: FrameTree,
  column: Column,
  ascending: boolean,
): (a: FunctionTotal, b: FunctionTotal) => number {
  const { names } = tree.functions;
  const byName = (a: FunctionTotal, b: FunctionTotal): number =>
    names[a.name]!.localeCompare(names[b.name]!, "en");
  const sign = ascending ? 1 : -1;
  if (column === "name") return (a, b) => sign * byName(a, b);
  return (a, b) => sign * (a[column] - b[column]) || b.total - a.total || byName(a, b);
}
