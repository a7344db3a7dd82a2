import { fetchLabels, fetchValues, type Selection } from "./api.ts";
import { byId, h } from "./dom.ts";
import { Picker } from "./picker.ts";
import {
  OPERATORS,
  SelectorError,
  formatSelector,
  meaning,
  parseSelector,
  type Matcher,
} from "./selector.ts";

const VALUES_MAX = 1000;

/** The filter bar: the same selector as chips, as a dialog to add one, and as text. */
export class LabelFilter {
  private readonly chips = byId("chips", HTMLElement);
  private readonly add = byId("add-filter", HTMLButtonElement);
  private readonly text = byId("query", HTMLInputElement);
  private readonly error = byId("query-error", HTMLElement);
  private readonly picker: Picker;
  private readonly selection: () => Selection;
  private readonly changed: (query: string) => void;
  private matchers: readonly Matcher[] = [];
  private shown: string | undefined;

  constructor(picker: Picker, selection: () => Selection, changed: (query: string) => void) {
    this.picker = picker;
    this.selection = selection;
    this.changed = changed;
    this.add.addEventListener("click", () => this.askLabel());
    byId("query-form", HTMLFormElement).addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit(this.text.value);
    });
    this.text.addEventListener("input", () => this.showError(undefined));
  }

  /** Shows a selector; one that cannot be read stays as text. */
  show(query: string): void {
    // A text that is being edited and a chip that has the focus outlive the rest of the page's changes.
    if (query === this.shown) return;
    this.shown = query;
    this.text.value = query;
    this.matchers = readable(query) ?? [];
    this.chips.replaceChildren(...this.matchers.map((matcher, index) => this.chip(matcher, index)));
  }

  /** Shows why the backend refused the selector, or that it did not. */
  showError(message: string | undefined): void {
    this.error.textContent = message ?? "";
    this.error.hidden = message === undefined;
    this.text.setAttribute("aria-invalid", String(message !== undefined));
  }

  private submit(query: string): void {
    try {
      parseSelector(query);
    } catch (error) {
      if (!(error instanceof SelectorError)) throw error;
      this.showError(error.message);
      this.text.focus();
      this.text.setSelectionRange(error.position, error.position + 1);
      return;
    }
    this.showError(undefined);
    this.changed(query.trim());
  }

  private use(matchers: readonly Matcher[]): void {
    this.showError(undefined);
    this.changed(formatSelector(matchers));
  }

  private chip(matcher: Matcher, index: number): HTMLElement {
    const { label, operator, value } = matcher;
    const replace = (...by: Matcher[]): void =>
      this.use([...this.matchers.slice(0, index), ...by, ...this.matchers.slice(index + 1)]);
    const next = OPERATORS[(OPERATORS.indexOf(operator) + 1) % OPERATORS.length]!;
    const said = `${label} ${meaning(operator)} ${value}`;
    return h(
      "li",
      { class: "chip", "data-label": label },
      h("span", { class: "chip-label" }, label),
      h(
        "button",
        {
          type: "button",
          class: "chip-operator",
          "aria-label": `${said}. Change to: ${meaning(next)}`,
          title: `${meaning(operator)}. Click for “${meaning(next)}”.`,
          onclick: () => replace({ label, operator: next, value }),
        },
        operator,
      ),
      h(
        "button",
        {
          type: "button",
          class: "chip-value",
          "aria-label": `${said}. Choose another value`,
          title: value,
          onclick: ({ currentTarget }: MouseEvent) => {
            if (currentTarget instanceof HTMLElement) {
              this.askValue(currentTarget, label, (other) => replace({ label, operator, value: other }));
            }
          },
        },
        value === "" ? "(empty)" : value,
      ),
      h(
        "button",
        {
          type: "button",
          class: "chip-remove",
          "aria-label": `Remove filter ${said}`,
          onclick: () => replace(),
        },
        "×",
      ),
    );
  }

  private askLabel(): void {
    this.picker.ask(this.add, {
      title: "Filter by label",
      placeholder: "Label",
      free: true,
      load: async (signal) => ({ options: await fetchLabels(this.selection(), signal) }),
      chosen: (label) =>
        this.askValue(this.add, label, (value) =>
          this.use([...this.matchers, { label, operator: "=", value }]),
        ),
    });
  }

  private askValue(anchor: HTMLElement, label: string, chosen: (value: string) => void): void {
    // Other values of a label that is already filtered by have to be offered too.
    const others = this.matchers.filter((matcher) => matcher.label !== label);
    this.picker.ask(anchor, {
      title: `Value of ${label}`,
      placeholder: "Value",
      free: true,
      load: async (signal) => {
        const selection = { ...this.selection(), query: formatSelector(others) };
        const { values, truncated } = await fetchValues(label, selection, VALUES_MAX, signal);
        return {
          options: values,
          ...(truncated && { note: `Only the first ${VALUES_MAX} values are listed.` }),
        };
      },
      chosen,
    });
  }
}

function readable(query: string): Matcher[] | undefined {
  try {
    return parseSelector(query);
  } catch {
    return undefined;
  }
}
