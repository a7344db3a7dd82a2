import { fitCanvas, h } from "../dom.ts";
import { onSchemeChange, scheme, variable } from "../theme.ts";
import { functionColors } from "./color.ts";
import { listen, type Target } from "./interaction.ts";
import { WIDTH_MIN, between, layout, rangeOf, type Boxes, type Range } from "./layout.ts";
import { Outline } from "./outline.ts";
import { LEVEL_HEIGHT, Renderer, type Palette } from "./render.ts";
import type { Matches } from "./search.ts";
import { ROOT, type FrameTree } from "./tree.ts";

export interface Options {
  /** Prefix of element ids, one of its own per graph on the page. */
  readonly id: string;
  readonly label: string;
  /** The root is at the bottom, and what is below it in the tree is drawn above it. */
  readonly up?: boolean;
}

/** What a graph tells its owner. */
export interface Events {
  zoom(tree: FrameTree, node: number): void;
  hover(tree: FrameTree, node: number | undefined, clientX: number, clientY: number): void;
  menu(tree: FrameTree, node: number, clientX: number, clientY: number): void;
  escape(): void;
}

const ZOOM_MS = 140;
/** Longer than a frame takes, so that it does not pass during an animation. */
const STANDSTILL_MS = 60;

/** A flame graph in a box that scrolls. The canvas is as large as the box, however deep the stacks are. */
export class FlameGraph implements Target {
  readonly element: HTMLElement;
  private readonly canvas = h("canvas", { "aria-hidden": "true" });
  private readonly outline: Outline;
  private readonly events: Events;
  private readonly up: boolean;
  private renderer: Renderer | undefined;
  private shown: FrameTree | undefined;
  private unit = "";
  private palette: Palette | undefined;
  private matches: Matches | undefined;
  private boxes: Boxes | undefined;
  private range: Range = { from: 0, to: 0 };
  private zoomNode = ROOT;
  private hovered: number | undefined;
  private selectedPath: string | undefined;
  private frameRequest = 0;
  private animation = 0;
  private describing = 0;

  constructor(options: Options, events: Events) {
    this.events = events;
    this.up = options.up ?? false;
    this.outline = new Outline(options.id, options.label);
    this.element = h("div", { class: this.up ? "graph up" : "graph" }, this.canvas, this.outline.element);
    this.element.addEventListener("scroll", () => this.schedule(), { passive: true });
    new ResizeObserver(() => this.place()).observe(this.element);
    onSchemeChange(() => this.recolor());
    listen(this.outline.element, this, this.up);
  }

  /** Shows a tree, zoomed to the node with this path hash. */
  show(tree: FrameTree, unit: string, zoom: string): void {
    this.shown = tree;
    this.unit = unit;
    this.hovered = undefined;
    this.zoomNode = tree.find(zoom);
    this.range = rangeOf(tree, this.zoomNode);
    cancelAnimationFrame(this.animation);
    this.recolor();
    this.place();
  }

  /** Zooms the tree that is shown, if one is. */
  zoomTo(path: string): void {
    const node = this.shown?.find(path);
    if (!this.shown || node === undefined || node === this.zoomNode) return;
    this.zoomNode = node;
    this.animate(rangeOf(this.shown, node));
  }

  highlight(matches: Matches | undefined): void {
    this.matches = matches;
    this.schedule();
  }

  tree(): FrameTree {
    if (!this.shown) throw new Error("no tree is shown");
    return this.shown;
  }

  selected(): number | undefined {
    if (this.selectedPath === undefined || !this.shown) return undefined;
    return this.shown.find(this.selectedPath);
  }

  zoomed(): number {
    return this.zoomNode;
  }

  /** Path hash of the zoomed frame, to find it again in the next tree. */
  zoomPath(): string {
    return this.shown?.pathOf(this.zoomNode) ?? "";
  }

  hit(clientX: number, clientY: number): number | undefined {
    if (!this.shown || !this.boxes) return undefined;
    const { left, top, width } = this.outline.element.getBoundingClientRect();
    const level = this.levelAt(clientY - top);
    const perPixel = (this.range.to - this.range.from) / width;
    const node = level < 0 ? undefined : this.shown.at(level, this.range.from + (clientX - left) * perPixel);
    return node !== undefined && this.shown.total[node]! >= WIDTH_MIN * perPixel ? node : undefined;
  }

  hover(node: number | undefined, clientX: number, clientY: number): void {
    if (!this.shown) return;
    if (node !== this.hovered) this.schedule();
    this.hovered = node;
    this.events.hover(this.shown, node, clientX, clientY);
  }

  select(node: number): void {
    this.selectedPath = this.tree().pathOf(node);
    this.outline.activate(node);
    this.scrollTo(node);
    this.schedule();
  }

  zoom(node: number): void {
    this.events.zoom(this.tree(), node);
  }

  menu(node: number, clientX: number, clientY: number): void {
    this.events.menu(this.tree(), node, clientX, clientY);
  }

  middle(node: number): [number, number] {
    const tree = this.tree();
    const { left, top, width } = this.outline.element.getBoundingClientRect();
    const { from, to } = rangeOf(tree, node);
    const middle = (Math.max(from, this.range.from) + Math.min(to, this.range.to)) / 2;
    const part = (middle - this.range.from) / (this.range.to - this.range.from);
    return [left + part * width, top + this.topOf(tree.level[node]!) + LEVEL_HEIGHT / 2];
  }

  escape(): void {
    this.events.escape();
  }

  private animate(to: Range): void {
    cancelAnimationFrame(this.animation);
    if (window.matchMedia("(prefers-reduced-motion: reduce)").matches) {
      this.range = to;
      this.place();
      return;
    }
    const from = this.range;
    const begin = performance.now();
    const step = (now: number): void => {
      const part = Math.min(1, Math.max(0, (now - begin) / ZOOM_MS));
      this.range = between(from, to, 1 - (1 - part) ** 3);
      this.place();
      if (part < 1) this.animation = requestAnimationFrame(step);
    };
    this.animation = requestAnimationFrame(step);
  }

  private recolor(): void {
    if (!this.shown) return;
    this.palette = {
      boxes: functionColors(this.shown.functions, scheme()),
      text: variable("--frame-text"),
      faded: variable("--frame-faded"),
      fadedText: variable("--frame-faded-text"),
      outline: variable("--text"),
      hatch: variable("--frame-hatch"),
    };
    this.schedule();
  }

  /** Lays out again: after a new tree, another range or another size. */
  private place(): void {
    const { clientWidth, clientHeight } = this.element;
    if (!this.shown || clientWidth === 0) return;
    const atBottom = this.element.scrollTop + clientHeight >= this.element.scrollHeight - 1;
    this.boxes = layout(this.shown, this.range, clientWidth);
    this.outline.element.style.height = `${Math.max(this.contentHeight(), clientHeight)}px`;
    if (this.up && atBottom) this.element.scrollTop = this.element.scrollHeight;
    this.schedule();
    window.clearTimeout(this.describing);
    this.describing = window.setTimeout(() => this.describe(), STANDSTILL_MS);
  }

  private schedule(): void {
    if (this.frameRequest !== 0) return;
    this.frameRequest = requestAnimationFrame(() => {
      this.frameRequest = 0;
      this.draw();
    });
  }

  private draw(): void {
    const { shown: tree, boxes, palette } = this;
    const { clientWidth, clientHeight, scrollTop } = this.element;
    if (!tree || !boxes || !palette || clientWidth === 0) return;
    const context = fitCanvas(this.canvas, clientWidth, clientHeight);
    this.renderer ??= new Renderer(context);
    this.renderer.draw({
      tree,
      boxes,
      palette,
      matches: this.matches,
      zoomLevel: tree.level[this.zoomNode]!,
      hovered: this.hovered,
      selected: document.activeElement === this.outline.element ? this.selected() : undefined,
      top: (level) => this.topOf(level) - scrollTop,
      height: clientHeight,
    });
  }

  /** Brings the ARIA tree up to date, in a task of its own: hundreds of elements take longer than a frame. */
  private describe(): void {
    const { shown: tree, boxes } = this;
    if (!tree || !boxes) return;
    this.outline.show(tree, boxes, this.unit, (level) => this.topOf(level));
    this.outline.activate(this.selected());
  }

  private contentHeight(): number {
    return ((this.boxes?.deepest ?? 0) + 1) * LEVEL_HEIGHT;
  }

  private topOf(level: number): number {
    if (!this.up) return level * LEVEL_HEIGHT;
    return Math.max(this.contentHeight(), this.element.clientHeight) - (level + 1) * LEVEL_HEIGHT;
  }

  private levelAt(y: number): number {
    if (!this.up) return Math.floor(y / LEVEL_HEIGHT);
    return Math.floor((Math.max(this.contentHeight(), this.element.clientHeight) - y) / LEVEL_HEIGHT);
  }

  private scrollTo(node: number): void {
    const top = this.topOf(this.tree().level[node]!);
    const { scrollTop, clientHeight } = this.element;
    if (top < scrollTop) this.element.scrollTop = top;
    else if (top + LEVEL_HEIGHT > scrollTop + clientHeight)
      this.element.scrollTop = top + LEVEL_HEIGHT - clientHeight;
  }
}
