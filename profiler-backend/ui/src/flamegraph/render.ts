import type { Boxes } from "./layout.ts";
import { MARKER } from "./kind.ts";
import type { Matches } from "./search.ts";
import { TextFitter } from "./text.ts";
import type { FrameTree } from "./tree.ts";

/** Height of one level in CSS pixels, the gap below a box included. */
export const LEVEL_HEIGHT = 19;
export const FONT = '11.5px system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif';

const GAP = 1;
const TEXT_PADDING = 5;
/** Room for an ellipsis and a character or two; less says nothing. */
const TEXT_WIDTH_MIN = 24;

export interface Palette {
  /** CSS color per function. */
  readonly boxes: readonly string[];
  readonly text: string;
  /** Boxes that a search does not match, and the text on them. */
  readonly faded: string;
  readonly fadedText: string;
  readonly outline: string;
  readonly hatch: string;
}

export interface Scene {
  readonly tree: FrameTree;
  readonly boxes: Boxes;
  readonly palette: Palette;
  readonly matches: Matches | undefined;
  /** Levels above this one are the callers of the zoomed frame. */
  readonly zoomLevel: number;
  readonly hovered: number | undefined;
  readonly selected: number | undefined;
  /** Top of a level's boxes on the canvas. */
  readonly top: (level: number) => number;
  readonly height: number;
}

/** Draws frames on a canvas that has been sized and cleared. */
export class Renderer {
  private readonly context: CanvasRenderingContext2D;
  private readonly fitter: TextFitter;

  constructor(context: CanvasRenderingContext2D) {
    this.context = context;
    this.fitter = new TextFitter((text) => {
      context.font = FONT;
      return context.measureText(text).width;
    });
  }

  draw(scene: Scene): void {
    this.context.font = FONT;
    this.context.fontKerning = "none";
    this.context.textBaseline = "middle";
    for (let index = 0; index < scene.boxes.count; index += 1) this.frame(scene, index);
  }

  private frame(scene: Scene, index: number): void {
    const { tree, boxes } = scene;
    const node = boxes.node[index]!;
    const top = scene.top(tree.level[node]!);
    if (top + LEVEL_HEIGHT < 0 || top > scene.height) return;
    const left = boxes.left[index]!;
    // A gap between siblings, but none where it would eat the box.
    const width = boxes.width[index]! > 2.5 ? boxes.width[index]! - GAP : boxes.width[index]!;
    this.box(scene, node, left, top, width);
    if (width >= TEXT_WIDTH_MIN) this.label(scene, node, left, top, width);
    if (node === scene.hovered || node === scene.selected) this.outline(scene, left, top, width);
  }

  private box(scene: Scene, node: number, left: number, top: number, width: number): void {
    const { tree, palette } = scene;
    const faded = isFaded(scene, node);
    this.context.globalAlpha = tree.level[node]! < scene.zoomLevel ? 0.55 : 1;
    this.context.fillStyle = faded ? palette.faded : palette.boxes[tree.name[node]!]!;
    this.context.fillRect(left, top, width, LEVEL_HEIGHT - GAP);
    if (!faded && tree.kindOf(node) === MARKER) this.hatch(palette.hatch, left, top, width);
    this.context.globalAlpha = 1;
  }

  private hatch(color: string, left: number, top: number, width: number): void {
    const { context } = this;
    const height = LEVEL_HEIGHT - GAP;
    context.save();
    context.beginPath();
    context.rect(left, top, width, height);
    context.clip();
    context.beginPath();
    for (let x = left - height; x < left + width; x += 6) {
      context.moveTo(x, top + height);
      context.lineTo(x + height, top);
    }
    context.strokeStyle = color;
    context.lineWidth = 1.5;
    context.stroke();
    context.restore();
  }

  private label(scene: Scene, node: number, left: number, top: number, width: number): void {
    const text = this.fitter.fit(scene.tree.nameOf(node), width - 2 * TEXT_PADDING);
    if (text === "") return;
    this.context.fillStyle = isFaded(scene, node) ? scene.palette.fadedText : scene.palette.text;
    this.context.fillText(text, left + TEXT_PADDING, top + (LEVEL_HEIGHT - GAP) / 2 + 0.5);
  }

  private outline(scene: Scene, left: number, top: number, width: number): void {
    this.context.strokeStyle = scene.palette.outline;
    this.context.lineWidth = 1.5;
    this.context.strokeRect(left + 0.75, top + 0.75, Math.max(0.5, width - 1.5), LEVEL_HEIGHT - GAP - 1.5);
  }
}

function isFaded({ tree, matches }: Scene, node: number): boolean {
  return matches !== undefined && matches.byName[tree.name[node]!] === 0;
}
