import { mergeUrl, type ProfileType } from "./api.ts";
import { byId, h } from "./dom.ts";
import type { Loaded } from "./loader.ts";
import { RangeControl } from "./range.ts";
import { endsNow, type State, type Store } from "./state.ts";

/** What is shown, of what time, and the way out: the controls at the top. */
export class Header {
  private readonly store: Store;
  private readonly range: RangeControl;
  private readonly type = byId("type", HTMLSelectElement);
  private readonly sampleType = byId("sample-type", HTMLSelectElement);
  private readonly live = byId("live", HTMLButtonElement);
  private readonly download = byId("download", HTMLDetailsElement);
  private readonly pprof = byId("download-pprof", HTMLAnchorElement);
  private readonly json = byId("download-json", HTMLAnchorElement);

  constructor(store: Store, reload: () => void) {
    this.store = store;
    this.range = new RangeControl((range) => store.update(range));
    this.type.addEventListener("change", () => {
      store.update({ type: this.type.value, sampleType: "", zoom: "", focus: "", sandwich: "" });
    });
    this.sampleType.addEventListener("change", () => store.update({ sampleType: this.sampleType.value }));
    this.live.addEventListener("click", () => store.update({ live: !store.get().live }, "replace"));
    byId("reload", HTMLButtonElement).addEventListener("click", reload);
    this.closeDownload();
  }

  show(state: State): void {
    this.range.show(state);
    this.live.disabled = !endsNow(state);
    this.live.setAttribute("aria-pressed", String(state.live && endsNow(state)));
  }

  load({ types, selection, merge }: Loaded): void {
    const type = types.find((one) => one.type === merge.type);
    fill(
      this.type,
      types.map((one) => one.type),
      merge.type,
    );
    fill(this.sampleType, sampleTypes(type), merge.sampleType);
    // The times that were shown, so that the file holds the same samples.
    const shown = {
      ...selection,
      sampleType: merge.sampleType,
      from: String(merge.fromMs),
      to: String(merge.toMs),
    };
    this.pprof.href = mergeUrl({ ...shown, groupBy: "" }, "pprof");
    this.json.href = mergeUrl(shown, "json");
    this.pprof.download = `${merge.type}-${fileTime(merge.toMs)}.pb.gz`;
    this.json.download = `${merge.type}-${fileTime(merge.toMs)}.json`;
    this.range.show(this.store.get());
  }

  private closeDownload(): void {
    const close = (): void => {
      this.download.open = false;
    };
    this.download.addEventListener("keydown", ({ key }) => {
      if (key === "Escape") close();
    });
    document.addEventListener("pointerdown", ({ target }) => {
      if (target instanceof Node && !this.download.contains(target)) close();
    });
  }
}

function sampleTypes(type: ProfileType | undefined): string[] {
  return (type?.sample_types ?? []).map((one) => one.type);
}

/**
 * Fills a `<select>`, unless it holds just that already: an open list must not close under the user's hand. `none` is
 * what the empty value is called.
 */
export function fill(select: HTMLSelectElement, values: readonly string[], chosen: string, none = ""): void {
  const all = values.includes(chosen) ? values : [...values, chosen];
  const present = [...select.options].map(({ value }) => value);
  if (present.join("\n") !== all.join("\n")) {
    select.replaceChildren(...all.map((value) => h("option", { value }, value === "" ? none : value)));
  }
  select.value = chosen;
}

function fileTime(ms: number): string {
  return new Date(ms).toISOString().slice(0, 19).replace(/:/g, "");
}
