/** What ran a frame; the numbers are those of `Location.kind` in the profile. */
export const FRAME_KINDS = [
  { name: "other", label: "Other" },
  { name: "native", label: "Native" },
  { name: "kernel", label: "Kernel" },
  { name: "jit", label: "JIT" },
  { name: "go", label: "Go" },
  { name: "python", label: "Python" },
  { name: "jvm", label: "JVM" },
  { name: "v8", label: "V8" },
  { name: "marker", label: "Marker" },
] as const;

/** Stands for a stack that is cut, and says why; drawn hatched. */
export const MARKER = 8;

/** A kind this version does not know is shown as `other`. */
export function kindOf(value: number): number {
  return value in FRAME_KINDS ? value : 0;
}
