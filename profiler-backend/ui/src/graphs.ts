import { byId, h } from "./dom.ts";
import { percent, plural, quantity } from "./format.ts";
import { css, kindColor } from "./flamegraph/color.ts";
import {
  calleesOf,
  callersOf,
  focusOn,
  functionTotals,
  matchedTotal,
  type Wanted,
} from "./flamegraph/derive.ts";
import { FRAME_KINDS } from "./flamegraph/kind.ts";
import { search, type Matches } from "./flamegraph/search.ts";
import { ROOT, type FrameTree } from "./flamegraph/tree.ts";
import { FlameGraph, type Events } from "./flamegraph/view.ts";
import type { State } from "./state.ts";
import { onSchemeChange, scheme } from "./theme.ts";

export interface GraphEvents extends Events {
  /** The zoom, the focus or the sandwich view is to end. */
  leave(what: "zoom" | "focus" | "sandwich"): void;
}

/** The graphs: one of all stacks, or one of a function's callers above one of its callees. */
export class Graphs {
  private readonly whole: FlameGraph;
  private readonly callers: FlameGraph;
  private readonly callees: FlameGraph;
  private readonly single = byId("single", HTMLElement);
  private readonly sandwich = byId("sandwich", HTMLElement);
  private readonly scope = byId("scope", HTMLElement);
  private readonly matched = byId("matched", HTMLElement);
  private readonly legend = byId("legend", HTMLElement);
  private readonly missing = byId("missing", HTMLElement);
  private readonly events: GraphEvents;
  private loaded: FrameTree | undefined;
  private shown: FrameTree | undefined;
  private firstLevel = 1;
  private unit = "";

  constructor(events: GraphEvents) {
    this.events = events;
    this.whole = new FlameGraph({ id: "frame", label: "Flame graph" }, events);
    this.callers = new FlameGraph(
      { id: "caller", label: "Callers", up: true },
      this.local(() => this.callers),
    );
    this.callees = new FlameGraph(
      { id: "callee", label: "Callees" },
      this.local(() => this.callees),
    );
    this.single.append(this.whole.element);
    this.sandwich.append(
      h("h3", {}, "Callers"),
      this.callers.element,
      h("h3", {}, "Callees"),
      this.callees.element,
    );
    onSchemeChange(() => this.showLegend());
  }

  /** Shows new data the way the state says. */
  load(tree: FrameTree, unit: string, state: State): void {
    this.loaded = tree;
    this.unit = unit;
    this.derive(state);
  }

  /** Shows the same data another way. */
  update(state: State, before: State): void {
    if (!this.loaded) return;
    const rederive = state.focus !== before.focus || state.sandwich !== before.sandwich;
    if (rederive) this.derive(state);
    else if (state.zoom !== before.zoom) this.whole.zoomTo(state.zoom);
    if (!rederive && state.search !== before.search) this.highlight(state);
    this.showScope(state);
  }

  /** The tree that the table has to agree with, and the level at which functions begin in it. */
  current(): { tree: FrameTree; firstLevel: number } | undefined {
    return this.shown && { tree: this.shown, firstLevel: this.firstLevel };
  }

  matches(text: string): Matches | undefined {
    return this.loaded && search(this.loaded.functions, text);
  }

  private derive(state: State): void {
    const tree = this.loaded!;
    const wanted = state.sandwich || state.focus;
    const root = wanted === "" ? undefined : tree.functions.names.indexOf(wanted);
    const absent = root === -1;
    // Functions of several files may share a name.
    const isWanted: Wanted = (name) => tree.functions.names[name] === wanted;
    this.firstLevel = state.groupBy === "" ? 1 : 2;
    this.missing.hidden = !absent;
    this.missing.textContent = absent ? `${wanted} has no samples in this selection.` : "";
    this.single.hidden = state.sandwich !== "" || absent;
    this.sandwich.hidden = state.sandwich === "" || absent;
    if (root === undefined || absent) this.showWhole(tree, state);
    else if (state.sandwich !== "") this.showSandwich(tree, root, isWanted);
    else this.showWhole(focusOn(tree, isWanted), state);
    this.highlight(state);
    this.showScope(state);
    this.showLegend();
  }

  private showWhole(tree: FrameTree, state: State): void {
    this.shown = tree;
    this.whole.show(tree, this.unit, state.zoom);
  }

  private showSandwich(tree: FrameTree, root: number, wanted: Wanted): void {
    this.shown = calleesOf(tree, root, wanted);
    this.firstLevel = 0;
    this.callees.show(this.shown, this.unit, this.callees.zoomPath());
    this.callers.show(callersOf(tree, root, wanted), this.unit, this.callers.zoomPath());
  }

  private highlight(state: State): void {
    const matches = this.matches(state.search);
    for (const graph of [this.whole, this.callers, this.callees]) graph.highlight(matches);
    this.matched.textContent = this.matchedText(matches);
  }

  private matchedText(matches: Matches | undefined): string {
    if (!matches || !this.shown) return "";
    const total = matchedTotal(this.shown, (name) => matches.byName[name] === 1);
    return `${percent(total, this.shown.total[ROOT]!)} in ${plural(matches.count, "function")}`;
  }

  private showScope(state: State): void {
    const parts: HTMLElement[] = [];
    if (state.sandwich !== "")
      parts.push(this.pill("Callers and callees of", state.sandwich, "sandwich", this.shareShown()));
    else if (state.focus !== "")
      parts.push(this.pill("Only stacks through", state.focus, "focus", this.shareShown()));
    const node = this.shown && state.sandwich === "" ? this.shown.find(state.zoom) : ROOT;
    if (this.shown && node !== ROOT) parts.push(this.pill("Zoomed to", this.shown.nameOf(node), "zoom", ""));
    this.scope.replaceChildren(...parts);
  }

  /** How much of everything the shown tree is. */
  private shareShown(): string {
    if (!this.shown || !this.loaded) return "";
    const [part, whole] = [this.shown.total[ROOT]!, this.loaded.total[ROOT]!];
    return ` ${quantity(part, this.unit)}, ${percent(part, whole)}`;
  }

  private pill(text: string, name: string, what: "zoom" | "focus" | "sandwich", share: string): HTMLElement {
    const leave = (): void => this.events.leave(what);
    return h(
      "span",
      { class: "pill" },
      `${text} `,
      h("strong", { title: name }, name),
      share,
      h(
        "button",
        { type: "button", "aria-label": `Reset: ${text.toLowerCase()} ${name}`, onclick: leave },
        "×",
      ),
    );
  }

  /** Names the kinds that are on screen. */
  private showLegend(): void {
    if (!this.shown) return;
    const { kinds } = this.shown.functions;
    const present = new Set(functionTotals(this.shown, this.firstLevel).map(({ name }) => kinds[name]!));
    const items = FRAME_KINDS.flatMap(({ name, label }, kind) => {
      if (!present.has(kind)) return [];
      const swatch = h("span", { class: name === "marker" ? "swatch hatched" : "swatch" });
      swatch.style.backgroundColor = css(kindColor(kind, 0, scheme()));
      return [h("li", {}, swatch, label)];
    });
    this.legend.replaceChildren(...items);
  }

  /** The sandwich's graphs zoom by themselves: their frames have no place in the address bar. */
  private local(graph: () => FlameGraph): Events {
    return {
      ...this.events,
      zoom: (tree, node) => graph().zoomTo(tree.pathOf(node)),
      hover: (...all) => this.events.hover(...all),
      menu: (...all) => this.events.menu(...all),
      escape: () => {
        if (graph().zoomed() === ROOT) this.events.escape();
        else graph().zoomTo("");
      },
    };
  }
}
