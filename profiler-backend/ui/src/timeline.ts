import type { Series } from "./api.ts";
import { byId, fitCanvas, h } from "./dom.ts";
import { clock, localDateTime, stepValue } from "./format.ts";
import { stack, tickMs, firstTick, type Stacks } from "./stacks.ts";
import { onSchemeChange, variable } from "./theme.ts";
import type { Tooltip } from "./tooltip.ts";

const AXIS_HEIGHT = 18;
const TOP = 14;
const DRAG_MIN = 4;

/** Total over time. Dragging selects a range. */
export class Timeline {
  private readonly element = byId("timeline", HTMLElement);
  private readonly canvas = h("canvas", { role: "img" });
  private readonly selection = h("div", { class: "timeline-selection", hidden: true });
  private readonly legend = byId("timeline-legend", HTMLElement);
  private readonly tooltip: Tooltip;
  private readonly selected: (fromMs: number, toMs: number) => void;
  private series: Series | undefined;
  private stacks: Stacks = { lines: [], totals: [], peak: 0 };
  private delta = true;
  private dragFrom: number | undefined;

  constructor(tooltip: Tooltip, selected: (fromMs: number, toMs: number) => void) {
    this.tooltip = tooltip;
    this.selected = selected;
    this.element.append(this.canvas, this.selection);
    new ResizeObserver(() => this.draw()).observe(this.element);
    onSchemeChange(() => this.draw());
    this.element.addEventListener("pointerdown", (event) => this.begin(event));
    this.element.addEventListener("pointermove", (event) => this.move(event));
    this.element.addEventListener("pointerup", (event) => this.finish(event));
    this.element.addEventListener("pointercancel", () => this.cancel());
    this.element.addEventListener("pointerleave", () => this.tooltip.hide());
  }

  show(series: Series, delta: boolean): void {
    this.series = series;
    this.delta = delta;
    this.stacks = stack(series.lines);
    const peak = this.label(this.stacks.peak);
    this.canvas.setAttribute("aria-label", `Total over time, at most ${peak} per ${series.stepMs / 1000} s`);
    this.showLegend();
    this.draw();
  }

  private label(value: number): string {
    const { unit, stepMs } = this.series!;
    return stepValue(value, unit, stepMs, this.delta);
  }

  private showLegend(): void {
    const { lines } = this.stacks;
    const named = lines.length > 1 || (lines[0]?.name ?? "") !== "";
    this.legend.replaceChildren(
      ...(named ? lines : []).map(({ name }, index) => {
        const swatch = h("span", { class: "swatch" });
        swatch.style.background = variable(`--line-${index}`);
        return h("li", {}, swatch, name === "" ? "(none)" : name);
      }),
    );
  }

  private draw(): void {
    const { clientWidth: width, clientHeight: height } = this.element;
    if (!this.series || width === 0) return;
    const context = fitCanvas(this.canvas, width, height);
    context.font = '11px system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif';
    this.drawTimes(context, width, height);
    this.drawBars(context, width, height - AXIS_HEIGHT);
    this.drawPeak(context, width);
  }

  private drawBars(context: CanvasRenderingContext2D, width: number, bottom: number): void {
    const { lines, totals, peak } = this.stacks;
    const pitch = width / Math.max(1, totals.length);
    const gap = pitch > 4 ? 1 : 0;
    const colors = lines.map((_, index) => variable(`--line-${index}`));
    totals.forEach((_, step) => {
      let top = bottom;
      lines.forEach(({ values }, line) => {
        const value = values[step] ?? 0;
        if (value <= 0) return;
        const barHeight = Math.max(0.5, (value / peak) * (bottom - TOP));
        top -= barHeight;
        context.fillStyle = colors[line]!;
        context.fillRect(step * pitch, top, Math.max(0.5, pitch - gap), barHeight);
      });
    });
    context.fillStyle = variable("--border");
    context.fillRect(0, bottom, width, 1);
  }

  private drawPeak(context: CanvasRenderingContext2D, width: number): void {
    if (this.stacks.peak === 0) return;
    context.fillStyle = variable("--border");
    context.fillRect(0, TOP - 0.5, width, 0.5);
    context.fillStyle = variable("--muted");
    context.textBaseline = "bottom";
    context.fillText(this.label(this.stacks.peak), 0, TOP - 2);
  }

  private drawTimes(context: CanvasRenderingContext2D, width: number, height: number): void {
    const { startMs, stepMs } = this.series!;
    const total = this.stacks.totals.length * stepMs;
    const tick = tickMs(total, width);
    context.textBaseline = "alphabetic";
    for (let at = firstTick(startMs, tick); at < startMs + total; at += tick) {
      const x = ((at - startMs) / total) * width;
      const text = clock(at, true);
      const textWidth = context.measureText(text).width;
      context.fillStyle = variable("--border");
      context.fillRect(Math.round(x), TOP, 1, height - AXIS_HEIGHT - TOP + 4);
      context.fillStyle = variable("--muted");
      if (x - textWidth / 2 > 0 && x + textWidth / 2 < width)
        context.fillText(text, x - textWidth / 2, height - 4);
    }
  }

  private offset(event: PointerEvent): number {
    const { left, width } = this.element.getBoundingClientRect();
    return Math.max(0, Math.min(width, event.clientX - left));
  }

  private begin(event: PointerEvent): void {
    if (event.button !== 0 || !this.series) return;
    this.element.setPointerCapture(event.pointerId);
    this.dragFrom = this.offset(event);
  }

  private move(event: PointerEvent): void {
    if (!this.series || this.stacks.totals.length === 0) return;
    const offset = this.offset(event);
    this.showStep(offset, event);
    if (this.dragFrom === undefined) return;
    const [left, right] = [Math.min(offset, this.dragFrom), Math.max(offset, this.dragFrom)];
    this.selection.hidden = right - left < DRAG_MIN;
    this.selection.style.left = `${left}px`;
    this.selection.style.width = `${right - left}px`;
  }

  private finish(event: PointerEvent): void {
    const from = this.dragFrom;
    this.cancel();
    if (from === undefined || !this.series) return;
    const to = this.offset(event);
    if (Math.abs(to - from) < DRAG_MIN) return;
    const { startMs, stepMs } = this.series;
    const msPerPixel = (this.stacks.totals.length * stepMs) / this.element.clientWidth;
    // Whole seconds: finer than that nothing is recorded.
    const at = (offset: number): number => Math.round((startMs + offset * msPerPixel) / 1000) * 1000;
    this.selected(at(Math.min(from, to)), Math.max(at(Math.max(from, to)), at(Math.min(from, to)) + 1000));
  }

  private cancel(): void {
    this.dragFrom = undefined;
    this.selection.hidden = true;
  }

  private showStep(offset: number, event: PointerEvent): void {
    const { startMs, stepMs } = this.series!;
    const { lines, totals } = this.stacks;
    const step = Math.min(totals.length - 1, Math.floor((offset / this.element.clientWidth) * totals.length));
    const at = startMs + step * stepMs;
    const head = h("div", { class: "tooltip-name" }, `${localDateTime(at).replace("T", " ")}`);
    const rows: [string, number][] = [["Total", totals[step]!]];
    if (lines.length > 1)
      rows.push(
        ...lines.map(({ name, values }): [string, number] => [
          name === "" ? "(none)" : name,
          values[step] ?? 0,
        ]),
      );
    const list = h(
      "dl",
      {},
      ...rows.flatMap(([term, value]) => [h("dt", {}, term), h("dd", {}, this.label(value))]),
    );
    this.tooltip.show([head, list], event.clientX, event.clientY);
  }
}
