import { h, placeAt } from "./dom.ts";

export interface Item {
  readonly label: string;
  readonly run: () => void;
}

/** A context menu: one at a time, closed by Escape, a click elsewhere, or leaving it with Tab. */
export class Menu {
  private readonly element = h("div", {
    class: "menu",
    role: "menu",
    hidden: true,
    onkeydown: (event: KeyboardEvent) => this.press(event),
  });
  private opener: Element | null = null;

  constructor() {
    document.body.append(this.element);
    document.addEventListener("pointerdown", (event) => {
      if (event.target instanceof Node && !this.element.contains(event.target)) this.close();
    });
    this.element.addEventListener("focusout", ({ relatedTarget }) => {
      if (!(relatedTarget instanceof Node) || !this.element.contains(relatedTarget)) this.close();
    });
  }

  open(title: string, items: readonly Item[], clientX: number, clientY: number): void {
    this.opener = document.activeElement;
    const buttons = items.map(({ label, run }) =>
      h(
        "button",
        { type: "button", role: "menuitem", tabindex: "-1", onclick: () => this.choose(run) },
        label,
      ),
    );
    this.element.replaceChildren(h("div", { class: "menu-title" }, title), ...buttons);
    this.element.hidden = false;
    placeAt(this.element, clientX, clientY);
    buttons[0]?.focus();
  }

  private close(): void {
    this.element.hidden = true;
  }

  private choose(run: () => void): void {
    this.dismiss();
    run();
  }

  /** Closes and gives the focus back to where it was. */
  private dismiss(): void {
    this.close();
    if (this.opener instanceof HTMLElement) this.opener.focus();
  }

  private press(event: KeyboardEvent): void {
    switch (event.key) {
      case "Escape":
        this.dismiss();
        break;
      case "ArrowDown":
        this.move(1);
        break;
      case "ArrowUp":
        this.move(-1);
        break;
      default:
        return;
    }
    event.preventDefault();
    event.stopPropagation();
  }

  private move(by: number): void {
    const buttons = [...this.element.querySelectorAll("button")];
    const at = buttons.findIndex((button) => button === document.activeElement);
    buttons[(at + by + buttons.length) % buttons.length]?.focus();
  }
}
