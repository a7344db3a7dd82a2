import { FrameTree, type RawTree } from "./flamegraph/tree.ts";

export interface SampleType {
  readonly type: string;
  readonly unit: string;
}

export interface ProfileType {
  readonly type: string;
  readonly temporality: string;
  readonly sample_types: readonly SampleType[];
  readonly default_sample_type: string;
}

/** What is asked of every endpoint: one profile type, one selector, one range. Empty fields are left to the backend. */
export interface Selection {
  readonly type: string;
  readonly sampleType: string;
  readonly query: string;
  readonly from: string;
  readonly to: string;
  readonly groupBy: string;
}

/** `/api/v1/merge`: one tree for the whole selection. */
export interface Merge {
  readonly type: string;
  readonly sampleType: string;
  readonly unit: string;
  readonly delta: boolean;
  readonly fromMs: number;
  readonly toMs: number;
  readonly profiles: number;
  /** Time covered by profiles, which is less than the range where nothing was recorded. */
  readonly durationMs: number;
  readonly truncatedNodes: number;
  readonly comments: readonly string[];
  readonly tree: FrameTree;
}

export interface Line {
  readonly name: string;
  readonly values: readonly number[];
}

/** `/api/v1/series`: totals per step, one line per value of the grouping label. */
export interface Series {
  readonly unit: string;
  readonly stepMs: number;
  readonly startMs: number;
  readonly lines: readonly Line[];
}

/** `/api/v1/binaries`: how well the code of each binary unwinds and is named. */
export interface Binaries {
  readonly unit: string;
  readonly binaries: readonly Binary[];
  /** Binaries that the answer has no room for. */
  readonly leftOut: number;
}

export interface Binary {
  readonly name: string;
  /** Value of the stacks with a frame of it. */
  readonly total: number;
  /** Of those, the ones that end in it too early. */
  readonly truncated: number;
  /** Share of its frames without a name. */
  readonly unknownPercent: number;
  /** Why most of the truncated ones end. */
  readonly reason: string | null;
  /** What would help. */
  readonly hint: string | null;
}

export interface LabelValues {
  readonly values: readonly string[];
  readonly truncated: boolean;
}

/** The backend refused (`status` set) or did not answer (`status` 0). `message` is one line, fit to be shown. */
export class ApiError extends Error {
  readonly status: number;

  constructor(message: string, status: number) {
    super(message);
    this.status = status;
  }
}

const BASE = "api/v1/";

function parameters(selection: Selection, more: Readonly<Record<string, string>> = {}): string {
  const { type, sampleType, query, from, to, groupBy } = selection;
  const all = { type, sample_type: sampleType, query, from, to, group_by: groupBy, ...more };
  const given = Object.entries(all).filter(([, value]) => value !== "");
  return new URLSearchParams(given).toString();
}

/** Address of the merged profile, for a download link. */
export function mergeUrl(selection: Selection, format: "pprof" | "json"): string {
  return `${BASE}merge?${parameters(selection, { format })}`;
}

export async function fetchTypes(signal: AbortSignal): Promise<ProfileType[]> {
  const { types } = await get<{ types: ProfileType[] }>("types", signal);
  return types;
}

export async function fetchLabels(selection: Selection, signal: AbortSignal): Promise<string[]> {
  const { from, to } = selection;
  const { labels } = await get<{ labels: string[] }>(`labels?${new URLSearchParams({ from, to })}`, signal);
  return labels;
}

/** Values of one label among the profiles that `selection` selects; at most `limit` of them. */
export async function fetchValues(
  label: string,
  selection: Selection,
  limit: number,
  signal: AbortSignal,
): Promise<LabelValues> {
  const query = parameters({ ...selection, groupBy: "" }, { limit: String(limit) });
  return get<LabelValues>(`labels/${encodeURIComponent(label)}/values?${query}`, signal);
}

interface SeriesAnswer {
  unit: string;
  step_ms: number;
  start_ms: number;
  series: { labels: Record<string, string>; values: (number | null)[] }[];
}

export async function fetchSeries(
  selection: Selection,
  stepMs: number,
  signal: AbortSignal,
): Promise<Series> {
  const query = parameters(selection, { step: `${stepMs / 1000}s` });
  const answer = await get<SeriesAnswer>(`series?${query}`, signal);
  const lines = answer.series.map(({ labels, values }) => ({
    name: labels[selection.groupBy] ?? "",
    values: values.map((value) => value ?? 0),
  }));
  return { unit: answer.unit, stepMs: answer.step_ms, startMs: answer.start_ms, lines };
}

interface MergeAnswer extends RawTree {
  type: string;
  sample_type: string;
  unit: string;
  temporality: string;
  from_ms: number;
  to_ms: number;
  profiles: number;
  duration_ms: number;
  truncated_nodes: number;
  comments: string[];
}

export async function fetchMerge(selection: Selection, signal: AbortSignal): Promise<Merge> {
  const answer = await get<MergeAnswer>(mergeUrl(selection, "json").slice(BASE.length), signal);
  return {
    type: answer.type,
    sampleType: answer.sample_type,
    unit: answer.unit,
    delta: answer.temporality === "delta",
    fromMs: answer.from_ms,
    toMs: answer.to_ms,
    profiles: answer.profiles,
    durationMs: answer.duration_ms,
    truncatedNodes: answer.truncated_nodes,
    comments: answer.comments,
    tree: FrameTree.decode(answer),
  };
}

interface BinariesAnswer {
  unit: string;
  binaries: {
    binary: string;
    total: number;
    truncated: number;
    unknown_percent: number;
    reason: string | null;
    hint: string | null;
  }[];
  left_out: number;
}

export async function fetchBinaries(selection: Selection, signal: AbortSignal): Promise<Binaries> {
  const query = parameters({ ...selection, groupBy: "" });
  const answer = await get<BinariesAnswer>(`binaries?${query}`, signal);
  const binaries = answer.binaries.map(({ binary, total, truncated, unknown_percent, reason, hint }) => ({
    name: binary,
    total,
    truncated,
    unknownPercent: unknown_percent,
    reason,
    hint,
  }));
  return { unit: answer.unit, binaries, leftOut: answer.left_out };
}

/** The backend and this file ship in one binary, so the shape is trusted; the tree's indexes are checked in `FrameTree`. */
async function get<T>(path: string, signal: AbortSignal): Promise<T> {
  let answer: Response;
  try {
    answer = await fetch(BASE + path, { signal, headers: { accept: "application/json" } });
  } catch (error) {
    if (signal.aborted) throw error;
    throw new ApiError(`No answer from the backend at ${location.host}.`, 0);
  }
  if (!answer.ok) throw new ApiError(await errorLine(answer), answer.status);
  return (await answer.json()) as T;
}

async function errorLine(answer: Response): Promise<string> {
  const text = (await answer.text()).slice(0, 2000);
  try {
    const body: unknown = JSON.parse(text);
    if (typeof body === "object" && body !== null && "error" in body) return String(body.error);
  } catch {
    // Not JSON: a proxy in between, or a refusal before the API was reached.
  }
  return text.split("\n", 1)[0] || `The backend answered ${answer.status} ${answer.statusText}.`;
}
