import {
  ApiError,
  fetchMerge,
  fetchSeries,
  fetchTypes,
  type Merge,
  type ProfileType,
  type Selection,
  type Series,
} from "./api.ts";
import { endsNow, type State } from "./state.ts";
import { stepMs } from "./time.ts";

export interface Loaded {
  readonly types: readonly ProfileType[];
  readonly selection: Selection;
  readonly merge: Merge;
  readonly series: Series;
}

export interface LoaderEvents {
  busy(now: boolean): void;
  loaded(result: Loaded): void;
  failed(error: ApiError): void;
}

const LIVE_MS = 10_000;
/** While nothing at all is stored, or no backend answers: the first window comes soon after the agent's start. */
const IMPATIENT_MS = 2_000;

/** Loads what the state asks for, one load at a time, the newest wins; follows the present while the state says so. */
export class Loader {
  private readonly state: () => State;
  private readonly events: LoaderEvents;
  private running = new AbortController();
  private timer: number | undefined;

  constructor(state: () => State, events: LoaderEvents) {
    this.state = state;
    this.events = events;
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden && this.follows()) void this.load();
    });
  }

  async load(): Promise<void> {
    this.running.abort();
    this.running = new AbortController();
    window.clearTimeout(this.timer);
    const { signal } = this.running;
    this.events.busy(true);
    const satisfied = await this.attempt(signal);
    if (signal.aborted) return;
    this.events.busy(false);
    this.scheduleNext(satisfied ? LIVE_MS : IMPATIENT_MS);
  }

  /** Starts or stops following, after the state has changed. */
  reschedule(): void {
    window.clearTimeout(this.timer);
    this.scheduleNext(LIVE_MS);
  }

  private async attempt(signal: AbortSignal): Promise<boolean> {
    try {
      const result = await this.fetch(signal);
      if (signal.aborted) return false;
      this.events.loaded(result);
      return result.merge.profiles > 0 || result.selection.query !== "";
    } catch (error) {
      if (signal.aborted) return false;
      const shown =
        error instanceof ApiError ? error : new ApiError(`The answer could not be read: ${String(error)}`, 0);
      this.events.failed(shown);
      // A refused request would be refused again.
      return shown.status >= 400 && shown.status < 500;
    }
  }

  private async fetch(signal: AbortSignal): Promise<Loaded> {
    const types = await fetchTypes(signal);
    const selection = select(this.state(), types);
    const [merge, series] = await Promise.all([
      fetchMerge(selection, signal),
      fetchSeries(selection, stepMs(selection, Date.now()), signal),
    ]);
    return { types, selection, merge, series };
  }

  private scheduleNext(afterMs: number): void {
    if (!this.follows()) return;
    this.timer = window.setTimeout(() => {
      if (!document.hidden) void this.load();
    }, afterMs);
  }

  private follows(): boolean {
    const state = this.state();
    return state.live && endsNow(state);
  }
}

/** What to ask the backend for; a profile type that is not named is CPU, or else the first there is. */
export function select(state: State, types: readonly ProfileType[]): Selection {
  const { type, sampleType, query, from, to, groupBy } = state;
  const fallback = types.find((one) => one.type === "cpu") ?? types[0];
  return { type: type === "" ? (fallback?.type ?? "") : type, sampleType, query, from, to, groupBy };
}
