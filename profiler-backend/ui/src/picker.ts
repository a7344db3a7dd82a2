import { h, placeUnder } from "./dom.ts";

/** Options to choose from, asked for again as the dialog moves on. */
export interface Question {
  readonly title: string;
  readonly placeholder: string;
  /** A note below the list, such as that there are more. */
  readonly load: (signal: AbortSignal) => Promise<{ options: readonly string[]; note?: string }>;
  /** Whether a text that is no option may be taken as it is. */
  readonly free: boolean;
  readonly chosen: (option: string) => void;
}

const SHOWN_MAX = 200;

/** A list with a search box above it, under the button that opened it (ARIA: a combobox with a listbox). */
export class Picker {
  private readonly title = h("div", { class: "picker-title", id: "picker-title" });
  private readonly input = h("input", {
    type: "text",
    role: "combobox",
    "aria-labelledby": "picker-title",
    "aria-expanded": "true",
    "aria-controls": "picker-list",
    autocomplete: "off",
    spellcheck: "false",
    oninput: () => this.filter(),
    onkeydown: (event: KeyboardEvent) => this.press(event),
  });
  private readonly list = h("div", {
    class: "picker-list",
    id: "picker-list",
    role: "listbox",
    "aria-labelledby": "picker-title",
  });
  private readonly note = h("div", { class: "picker-note" });
  private readonly element = h(
    "div",
    { class: "picker", hidden: true },
    this.title,
    this.input,
    this.list,
    this.note,
  );
  private anchor: HTMLElement | undefined;
  private question: Question | undefined;
  private options: readonly string[] = [];
  private loadNote = "";
  private active = 0;
  private loading = new AbortController();

  constructor() {
    document.body.append(this.element);
    document.addEventListener("pointerdown", ({ target }) => {
      const inside =
        target instanceof Node && (this.element.contains(target) || this.anchor?.contains(target));
      if (!inside) this.close();
    });
    this.element.addEventListener("focusout", ({ relatedTarget }) => {
      if (relatedTarget instanceof Node && !this.element.contains(relatedTarget)) this.close();
    });
  }

  ask(anchor: HTMLElement, question: Question): void {
    this.anchor = anchor;
    this.question = question;
    this.options = [];
    this.loadNote = "Loading…";
    this.title.textContent = question.title;
    this.input.value = "";
    this.input.placeholder = question.placeholder;
    this.element.hidden = false;
    this.filter();
    placeUnder(this.element, anchor);
    this.input.focus();
    void this.load(question);
  }

  close(): void {
    this.loading.abort();
    this.question = undefined;
    this.element.hidden = true;
  }

  private async load(question: Question): Promise<void> {
    this.loading.abort();
    this.loading = new AbortController();
    const { signal } = this.loading;
    try {
      const { options, note } = await question.load(signal);
      if (signal.aborted) return;
      this.options = options;
      this.loadNote = note ?? (options.length === 0 ? "Nothing in this range." : "");
    } catch (error) {
      if (signal.aborted) return;
      this.loadNote = error instanceof Error ? error.message : String(error);
    }
    this.filter();
  }

  private filter(): void {
    const wanted = this.input.value.trim().toLowerCase();
    const found = this.options.filter((option) => option.toLowerCase().includes(wanted));
    const shown = found
      .slice(0, SHOWN_MAX)
      .map((option, index) => this.option(option, option === "" ? "(empty)" : option, index));
    const typed = this.input.value.trim();
    if (this.question?.free && typed !== "" && !this.options.includes(typed)) {
      shown.push(this.option(typed, `Use “${typed}”`, shown.length));
    }
    this.list.replaceChildren(...shown);
    this.note.textContent =
      found.length > SHOWN_MAX ? `${found.length - SHOWN_MAX} more: type to narrow down.` : this.loadNote;
    this.activate(0);
  }

  private option(value: string, label: string, index: number): HTMLElement {
    return h(
      "div",
      {
        class: "picker-option",
        id: `picker-option-${index}`,
        role: "option",
        "aria-selected": "false",
        "data-value": value,
        title: label,
        // The input keeps the focus, so that the list stays open until the click is complete.
        onpointerdown: (event: PointerEvent) => event.preventDefault(),
        onclick: () => this.choose(value),
        onpointermove: () => this.activate(index),
      },
      label,
    );
  }

  private activate(index: number): void {
    const options = [...this.list.children];
    options[this.active]?.setAttribute("aria-selected", "false");
    this.active = Math.max(0, Math.min(index, options.length - 1));
    const option = options[this.active];
    option?.setAttribute("aria-selected", "true");
    option?.scrollIntoView({ block: "nearest" });
    this.input.setAttribute("aria-activedescendant", option?.id ?? "");
  }

  private choose(value: string): void {
    const { question, anchor } = this;
    this.close();
    anchor?.focus();
    question?.chosen(value);
  }

  private press(event: KeyboardEvent): void {
    switch (event.key) {
      case "ArrowDown":
        this.activate(this.active + 1);
        break;
      case "ArrowUp":
        this.activate(this.active - 1);
        break;
      case "Enter": {
        const option = this.list.children[this.active];
        if (option instanceof HTMLElement) this.choose(option.dataset["value"] ?? "");
        break;
      }
      case "Escape":
        this.close();
        this.anchor?.focus();
        break;
      default:
        return;
    }
    event.preventDefault();
    event.stopPropagation();
  }
}
