/** All that makes a view, kept in the address bar: a link shows another person the same thing. */
export interface State {
  /** Profile type, empty for the backend's first one. */
  readonly type: string;
  /** Sample type inside it, empty for its default. */
  readonly sampleType: string;
  /** Label selector, see `selector.ts`. */
  readonly query: string;
  /** `now-15m` or Unix ms. */
  readonly from: string;
  /** `now` or Unix ms. */
  readonly to: string;
  /** Label whose values split timeline and flame graph, or empty. */
  readonly groupBy: string;
  readonly view: View;
  /** Path hash of the frame that fills the width, or empty. */
  readonly zoom: string;
  /** Regular expression over function names. */
  readonly search: string;
  /** Only stacks through this function. */
  readonly focus: string;
  /** Callers and callees of this function instead of the whole graph. */
  readonly sandwich: string;
  /** Follow the present; only for a range that ends now. */
  readonly live: boolean;
}

export const VIEWS = ["both", "graph", "table", "binaries"] as const;
export type View = (typeof VIEWS)[number];

/** The view of that name, if there is one. */
export function viewOf(name: string | null | undefined): View | undefined {
  return VIEWS.find((view) => view === name);
}

export const DEFAULTS: State = {
  type: "",
  sampleType: "",
  query: "",
  from: "now-15m",
  to: "now",
  groupBy: "",
  view: "both",
  zoom: "",
  search: "",
  focus: "",
  sandwich: "",
  live: true,
};

const PARAMETERS = {
  type: "type",
  sampleType: "sample_type",
  query: "query",
  from: "from",
  to: "to",
  groupBy: "group_by",
  zoom: "zoom",
  search: "search",
  focus: "focus",
  sandwich: "sandwich",
} as const;

type TextKey = keyof typeof PARAMETERS;
const TEXT_KEYS = Object.keys(PARAMETERS) as TextKey[];

/** Reads the query part of an address; what is absent or unknown has its default. */
export function parseState(search: string): State {
  const given = new URLSearchParams(search);
  const text = Object.fromEntries(
    TEXT_KEYS.map((key) => [key, given.get(PARAMETERS[key]) ?? DEFAULTS[key]]),
  ) as Record<TextKey, string>;
  return {
    ...text,
    view: viewOf(given.get("view")) ?? DEFAULTS.view,
    live: given.get("live") !== "0",
  };
}

/** Writes the query part of an address, with its `?`; defaults are left out. */
export function formatState(state: State): string {
  const out = new URLSearchParams();
  for (const key of TEXT_KEYS) {
    if (state[key] !== DEFAULTS[key]) out.set(PARAMETERS[key], state[key]);
  }
  if (state.view !== DEFAULTS.view) out.set("view", state.view);
  if (!state.live) out.set("live", "0");
  const text = out.toString();
  return text === "" ? "" : `?${text}`;
}

/** Whether a change needs other data from the backend. */
export function needsData(before: State, after: State): boolean {
  const keys = ["type", "sampleType", "query", "from", "to", "groupBy"] as const;
  return keys.some((key) => before[key] !== after[key]);
}

/** Whether the range ends now, so that the view can follow the present. */
export function endsNow(state: State): boolean {
  return state.to === "now";
}

/** Typing in a search box changes the current history entry; everything else makes a new one. */
export type History = "push" | "replace";

type Listener = (after: State, before: State) => void;

/** The state and the address bar, kept equal. */
export class Store {
  private current: State;
  private readonly listeners: Listener[] = [];

  constructor() {
    this.current = parseState(location.search);
    window.addEventListener("popstate", () => this.become(parseState(location.search)));
  }

  get(): State {
    return this.current;
  }

  update(patch: Partial<State>, how: History = "push"): void {
    const next = { ...this.current, ...patch };
    const address = formatState(next);
    if (address === formatState(this.current)) return;
    const target = location.pathname + address;
    if (how === "push") history.pushState(null, "", target);
    else history.replaceState(null, "", target);
    this.become(next);
  }

  subscribe(listener: Listener): void {
    this.listeners.push(listener);
  }

  private become(next: State): void {
    const before = this.current;
    this.current = next;
    for (const listener of this.listeners) listener(next, before);
  }
}
