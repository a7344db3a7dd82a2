import { fetchLabels, type ApiError, type Merge, type Selection } from "./api.ts";
import { BinaryTable } from "./binaries.ts";
import { byId, h } from "./dom.ts";
import { cores, plural, quantity, span } from "./format.ts";
import { exactly, patternError } from "./flamegraph/search.ts";
import { ROOT, type FrameTree } from "./flamegraph/tree.ts";
import { Graphs } from "./graphs.ts";
import { Header, fill } from "./header.ts";
import { LabelFilter } from "./labels.ts";
import { Loader, select, type Loaded } from "./loader.ts";
import { Menu, type Item } from "./menu.ts";
import { Picker } from "./picker.ts";
import { needsData, Store, viewOf, type State } from "./state.ts";
import { TopTable } from "./table.ts";
import { Timeline } from "./timeline.ts";
import { Tooltip, describeFrame } from "./tooltip.ts";

/** The page: the state decides what is shown, every control only changes the state. */
class App {
  private readonly store = new Store();
  private readonly tooltip = new Tooltip();
  private readonly menu = new Menu();
  private readonly header = new Header(this.store, () => void this.loader.load());
  private readonly labels = new LabelFilter(
    new Picker(),
    () => this.selection(),
    (query) => this.requery(query),
  );
  private readonly timeline = new Timeline(this.tooltip, (from, to) =>
    this.store.update({ from: String(from), to: String(to) }),
  );
  private readonly graphs = new Graphs({
    zoom: (tree, node) => this.store.update({ zoom: tree.pathOf(node) }),
    hover: (tree, node, x, y) => this.hover(tree, node, x, y),
    menu: (tree, node, x, y) =>
      this.openMenu(tree.nameOf(node), x, y, node === ROOT ? undefined : tree.pathOf(node)),
    escape: () => this.escape(),
    leave: (what) => this.store.update({ [what]: "" }),
  });
  private readonly table = new TopTable({
    choose: (name) => this.store.update({ search: name === undefined ? "" : exactly(name) }),
    menu: (name, x, y) => this.openMenu(name, x, y),
  });
  private readonly binaries = new BinaryTable((error) => this.failed(error));
  private readonly loader = new Loader(() => this.store.get(), {
    busy: (now) => byId("progress", HTMLElement).toggleAttribute("hidden", !now),
    loaded: (result) => this.loaded(result),
    failed: (error) => this.failed(error),
  });
  private readonly searchBox = byId("search", HTMLInputElement);
  private readonly groupBy = byId("group-by", HTMLSelectElement);
  private readonly views = byId("views", HTMLElement);
  private unit = "";
  /** Labels to group by, and the empty one for no grouping. */
  private groups: readonly string[] = [""];
  private types: Loaded["types"] = [];

  start(): void {
    this.searchBox.addEventListener("input", () =>
      this.store.update({ search: this.searchBox.value }, "replace"),
    );
    this.groupBy.addEventListener("change", () =>
      this.store.update({ groupBy: this.groupBy.value, zoom: "" }),
    );
    this.views.addEventListener("click", ({ target }) => {
      const view = viewOf(target instanceof HTMLElement ? target.dataset["view"] : undefined);
      if (view) this.store.update({ view }, "replace");
    });
    document.addEventListener("keydown", (event) => this.press(event));
    this.store.subscribe((after, before) => this.changed(after, before));
    this.show(this.store.get());
    void this.loader.load();
  }

  private changed(after: State, before: State): void {
    this.show(after);
    this.graphs.update(after, before);
    const changesTable = (["focus", "sandwich", "search"] as const).some((key) => after[key] !== before[key]);
    if (changesTable) this.showTable(after);
    if (after.view !== before.view) this.showBinaries(after);
    if (needsData(before, after)) void this.loader.load();
    else if (after.live !== before.live) this.loader.reschedule();
  }

  private show(state: State): void {
    this.header.show(state);
    this.labels.show(state.query);
    this.showSearch(state);
    fill(this.groupBy, this.groups, state.groupBy, "nothing");
    byId("panels", HTMLElement).dataset["view"] = state.view;
    for (const button of this.views.querySelectorAll("button")) {
      button.setAttribute("aria-pressed", String(button.dataset["view"] === state.view));
    }
  }

  private showSearch(state: State): void {
    if (this.searchBox.value !== state.search) this.searchBox.value = state.search;
    const error = patternError(state.search);
    this.searchBox.setAttribute("aria-invalid", String(error !== undefined));
    this.searchBox.title = error ?? "";
  }

  private showTable({ search }: State): void {
    const current = this.graphs.current();
    if (current) this.table.show(current, this.unit, search, this.graphs.matches(search));
  }

  private showBinaries({ view }: State): void {
    if (view === "binaries") void this.binaries.load(this.selection());
  }

  private loaded(result: Loaded): void {
    const { merge, series } = result;
    const state = this.store.get();
    this.unit = merge.unit;
    this.types = result.types;
    this.showProblem(undefined);
    this.labels.showError(undefined);
    this.header.load(result);
    this.timeline.show(series, merge.delta);
    this.graphs.load(merge.tree, merge.unit, state);
    this.showTable(state);
    this.showBinaries(state);
    this.summarize(merge);
    const empty = merge.tree.total[ROOT] === 0;
    byId("empty", HTMLElement).hidden = !empty;
    byId("panels", HTMLElement).hidden = empty;
    byId("main", HTMLElement).setAttribute("aria-busy", "false");
    void this.offerLabels();
  }

  private failed(error: ApiError): void {
    // The selector is refused next to the selector, everything else above the page.
    const { query } = this.store.get();
    const aboutQuery = error.status === 400 && query !== "" && error.message.startsWith("parameter query:");
    this.labels.showError(aboutQuery ? error.message : undefined);
    this.showProblem(aboutQuery ? undefined : error.message);
  }

  private showProblem(message: string | undefined): void {
    const problem = byId("problem", HTMLElement);
    problem.hidden = message === undefined;
    problem.textContent = message ?? "";
  }

  private summarize(merge: Merge): void {
    const total = merge.tree.total[ROOT]!;
    const facts = [quantity(total, merge.unit)];
    if (merge.delta && merge.unit === "nanoseconds" && merge.durationMs > 0) {
      facts.push(cores(total / (merge.durationMs * 1e6)));
    }
    facts.push(`${plural(merge.profiles, "profile")} over ${span(merge.durationMs)}`);
    if (merge.truncatedNodes > 0) facts.push(`${plural(merge.truncatedNodes, "small node")} folded`);
    byId("summary", HTMLElement).textContent = merge.profiles > 0 ? facts.join(" · ") : "";
    byId("notes", HTMLElement).hidden = merge.comments.length === 0;
    byId("notes-list", HTMLElement).replaceChildren(...merge.comments.map((comment) => h("li", {}, comment)));
  }

  /** Which labels there are is of no use to the graph, so it is asked for after it. */
  private async offerLabels(): Promise<void> {
    try {
      this.groups = ["", ...(await fetchLabels(this.selection(), new AbortController().signal))];
      fill(this.groupBy, this.groups, this.store.get().groupBy, "nothing");
    } catch {
      // The next load says what is wrong with the backend.
    }
  }

  private selection(): Selection {
    return select(this.store.get(), this.types);
  }

  private requery(query: string): void {
    if (query === this.store.get().query) void this.loader.load();
    else this.store.update({ query, zoom: "" });
  }

  private hover(tree: FrameTree, node: number | undefined, x: number, y: number): void {
    if (node === undefined) this.tooltip.hide();
    else this.tooltip.show(describeFrame(tree, node, this.unit), x, y);
  }

  private openMenu(name: string, x: number, y: number, path?: string): void {
    this.tooltip.hide();
    const items: Item[] = [
      { label: "Search this name", run: () => this.store.update({ search: exactly(name) }) },
      {
        label: "Focus: only stacks through it",
        run: () => this.store.update({ focus: name, sandwich: "", zoom: "" }),
      },
      { label: "Callers and callees", run: () => this.store.update({ sandwich: name, focus: "", zoom: "" }) },
    ];
    // Browsers give the clipboard only to pages that came over TLS or from this machine.
    if (window.isSecureContext) {
      items.unshift({ label: "Copy name", run: () => void navigator.clipboard.writeText(name) });
    }
    if (path !== undefined && this.store.get().sandwich === "") {
      items.unshift({ label: "Zoom in", run: () => this.store.update({ zoom: path }) });
    }
    this.menu.open(name, items, x, y);
  }

  private escape(): void {
    const { zoom, search, focus, sandwich } = this.store.get();
    if (zoom !== "") this.store.update({ zoom: "" });
    else if (search !== "") this.store.update({ search: "" });
    else if (focus !== "" || sandwich !== "") this.store.update({ focus: "", sandwich: "" });
  }

  private press(event: KeyboardEvent): void {
    const { target, key } = event;
    const typing = target instanceof HTMLInputElement || target instanceof HTMLSelectElement;
    if (key === "/" && !typing) {
      event.preventDefault();
      this.searchBox.select();
    } else if (key === "Escape" && target === this.searchBox) {
      this.store.update({ search: "" }, "replace");
    } else if (key === "Escape" && !typing && !event.defaultPrevented) {
      this.escape();
    }
  }
}

new App().start();
