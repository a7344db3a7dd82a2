import assert from "node:assert/strict";
import { test } from "node:test";
import { kindColor, originOf, shadeOf, type Oklch, type Scheme } from "../src/flamegraph/color.ts";
import { FRAME_KINDS, kindOf } from "../src/flamegraph/kind.ts";

type Rgb = [number, number, number];

/** OKLCH -> linear sRGB; source: CSS Color 4, §10.2 sample code. */
function linearRgb({ lightness, chroma, hue }: Oklch): Rgb {
  const [a, b] = [chroma * Math.cos((hue * Math.PI) / 180), chroma * Math.sin((hue * Math.PI) / 180)];
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ];
}

function oklab([r, g, b]: Rgb): Rgb {
  const l = Math.cbrt(0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b);
  const m = Math.cbrt(0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b);
  const s = Math.cbrt(0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b);
  return [
    0.2104542553 * l + 0.793617785 * m - 0.0040720468 * s,
    1.9779984951 * l - 2.428592205 * m + 0.4505937099 * s,
    0.0259040371 * l + 0.7827717662 * m - 0.808675766 * s,
  ];
}

/** Full color vision deficiency on linear sRGB; source: Machado, Oliveira, Fernandes 2009, severity 1.0. */
const SIGHTS: Record<string, [Rgb, Rgb, Rgb]> = {
  normal: [
    [1, 0, 0],
    [0, 1, 0],
    [0, 0, 1],
  ],
  protanopia: [
    [0.152286, 1.052583, -0.204868],
    [0.114503, 0.786281, 0.099216],
    [-0.003882, -0.048116, 1.051998],
  ],
  deuteranopia: [
    [0.367322, 0.860646, -0.227968],
    [0.280085, 0.672501, 0.047413],
    [-0.01182, 0.04294, 0.968881],
  ],
  tritanopia: [
    [1.255528, -0.076749, -0.178779],
    [-0.078411, 0.930809, 0.147602],
    [0.004733, 0.691367, 0.3039],
  ],
};

function seen(color: Oklch, sight: [Rgb, Rgb, Rgb]): Rgb {
  const rgb = linearRgb(color);
  return oklab(
    sight.map((row) => Math.min(1, Math.max(0, row[0] * rgb[0] + row[1] * rgb[1] + row[2] * rgb[2]))) as Rgb,
  );
}

const kindNamed = (name: string): number => FRAME_KINDS.findIndex((kind) => kind.name === name);

test("native, kernel and JIT stay apart for all eyes; markers are hatched besides", () => {
  for (const scheme of ["light", "dark"] as Scheme[]) {
    for (const [sight, matrix] of Object.entries(SIGHTS)) {
      for (const [one, other] of [
        ["native", "kernel"],
        ["native", "jit"],
        ["kernel", "jit"],
      ] as const) {
        const [a, b] = [one, other].map((name) => seen(kindColor(kindNamed(name), 0, scheme), matrix)) as [
          Rgb,
          Rgb,
        ];
        const distance = Math.hypot(a[0] - b[0], a[1] - b[1], a[2] - b[2]);
        // About five times what is just noticeable.
        assert.ok(
          distance > 0.08,
          `${one} and ${other} are ${distance.toFixed(3)} apart in ${scheme}, ${sight}`,
        );
      }
    }
  }
});

test("text on every kind and shade has a contrast of at least 4.5", () => {
  const text = { light: "#1b1305", dark: "#ffffff" };
  const luminance = ([r, g, b]: Rgb): number => 0.2126 * r + 0.7152 * g + 0.0722 * b;
  const linear = (hex: string): Rgb =>
    [1, 3, 5].map((at) => {
      const value = Number.parseInt(hex.slice(at, at + 2), 16) / 255;
      return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    }) as Rgb;
  for (const scheme of ["light", "dark"] as Scheme[]) {
    for (let kind = 0; kind < FRAME_KINDS.length; kind += 1) {
      for (const shade of [-1, 0, 1]) {
        const [a, b] = [
          luminance(linearRgb(kindColor(kind, shade, scheme))),
          luminance(linear(text[scheme])),
        ];
        const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        assert.ok(
          contrast >= 4.5,
          `${FRAME_KINDS[kind]!.name} ${shade} in ${scheme}: ${contrast.toFixed(2)}`,
        );
      }
    }
  }
});

test("a shade depends on the binary or the source directory alone", () => {
  assert.equal(originOf("/src/a/b.rs:12"), "/src/a");
  assert.equal(originOf("/src/a/b.rs:99"), "/src/a");
  assert.equal(originOf("/usr/lib/libc.so.6"), "/usr/lib/libc.so.6");
  assert.equal(originOf("main.go:7"), "main.go");
  assert.equal(shadeOf("/usr/lib/libc.so.6"), shadeOf("/usr/lib/libc.so.6"));
  for (const origin of ["", "a", "/src/a", "[kernel.kallsyms]"]) {
    assert.ok(Math.abs(shadeOf(origin)) <= 1);
  }
});

test("an unknown kind is shown as other", () => {
  assert.equal(kindOf(8), 8);
  assert.equal(kindOf(77), 0);
});
