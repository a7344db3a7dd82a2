import { byId, h } from "./dom.ts";
import { localDateTime, clock, span } from "./format.ts";
import type { State } from "./state.ts";
import { bounds, type Times } from "./time.ts";

interface Preset {
  readonly from: string;
  readonly label: string;
  readonly ms: number;
}

const MINUTE = 60_000;
const PRESETS: readonly Preset[] = [
  { from: "now-5m", label: "5m", ms: 5 * MINUTE },
  { from: "now-15m", label: "15m", ms: 15 * MINUTE },
  { from: "now-1h", label: "1h", ms: 60 * MINUTE },
  { from: "now-6h", label: "6h", ms: 360 * MINUTE },
  { from: "now-24h", label: "24h", ms: 1440 * MINUTE },
];

/** Buttons for the usual ranges, and a form for any other. */
export class RangeControl {
  private readonly presets = byId("presets", HTMLElement);
  private readonly custom = byId("custom-range", HTMLDetailsElement);
  private readonly summary = byId("custom-range-label", HTMLElement);
  private readonly from = byId("range-from", HTMLInputElement);
  private readonly to = byId("range-to", HTMLInputElement);
  private readonly error = byId("range-error", HTMLElement);
  private readonly changed: (range: Times) => void;

  constructor(changed: (range: Times) => void) {
    this.changed = changed;
    this.presets.append(
      ...PRESETS.map(({ from, label, ms }) =>
        h(
          "button",
          {
            type: "button",
            "data-from": from,
            "aria-label": `Last ${span(ms)}`,
            onclick: () => this.changed({ from, to: "now" }),
          },
          label,
        ),
      ),
    );
    byId("range-form", HTMLFormElement).addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    this.custom.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.custom.open = false;
    });
    document.addEventListener("pointerdown", ({ target }) => {
      if (target instanceof Node && !this.custom.contains(target)) this.custom.open = false;
    });
  }

  show(state: State): void {
    const preset = PRESETS.find(({ from }) => from === state.from && state.to === "now");
    for (const button of this.presets.querySelectorAll("button")) {
      button.setAttribute("aria-pressed", String(button.dataset["from"] === preset?.from));
    }
    const { from, to } = bounds(state, Date.now());
    // Times that someone is about to enter are left alone.
    if (!this.custom.open) {
      this.from.value = localDateTime(from);
      this.to.value = localDateTime(to);
    }
    this.custom.classList.toggle("chosen", preset === undefined);
    this.summary.textContent = preset === undefined ? rangeLabel(from, to) : "Custom";
  }

  private submit(): void {
    const from = new Date(this.from.value).getTime();
    const to = new Date(this.to.value).getTime();
    const wrong = !(from < to);
    this.error.hidden = !wrong;
    if (wrong) return;
    this.custom.open = false;
    this.changed({ from: String(from), to: String(to) });
  }
}

function rangeLabel(from: number, to: number): string {
  const sameDay = new Date(from).toDateString() === new Date(to).toDateString();
  const day = (ms: number): string => `${localDateTime(ms).slice(0, 10)} ${clock(ms, true)}`;
  return `${day(from)} – ${sameDay ? clock(to, true) : day(to)}`;
}
