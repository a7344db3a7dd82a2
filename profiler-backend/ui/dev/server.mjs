// Serves dist/ and an API with made-up stacks, the same ones on every start, to work on the UI without a backend.
//   node dev/server.mjs [PORT]      PORT is 7790 when not given, 0 for any free one
import { readFile } from "node:fs/promises";
import { createServer } from "node:http";
import { gzipSync } from "node:zlib";

const DIST = new URL("../dist/", import.meta.url);
const TYPES = {
  ".html": "text/html; charset=utf-8",
  ".js": "text/javascript",
  ".css": "text/css",
  ".svg": "image/svg+xml",
};
const CSP = "default-src 'self'; script-src 'self'; style-src 'self'";

const CONTAINERS = {
  "checkout-7d9f": {
    kinds: [1, 2],
    binaries: ["/usr/bin/checkout", "/usr/lib/libc.so.6", "/usr/lib/libssl.so.3"],
  },
  "search-5c4b": { kinds: [4, 2], binaries: ["/app/search"] },
  "render-0": { kinds: [3, 5, 6, 7, 1, 2], binaries: ["/usr/bin/node", "/usr/bin/python3.12"] },
};
const WORDS = [
  "parse",
  "encode",
  "hash",
  "lookup",
  "merge",
  "flush",
  "poll",
  "alloc",
  "copy",
  "route",
  "sort",
  "render",
];
const KERNEL = [
  "entry_SYSCALL_64",
  "do_syscall_64",
  "vfs_read",
  "tcp_sendmsg",
  "futex_wait",
  "copy_user_generic",
];
const MARKER = "[truncated: no unwind information]";

function random(seed) {
  let state = seed;
  return () => (state = (Math.imul(state, 1664525) + 1013904223) >>> 0) / 2 ** 32;
}

class Names {
  names = ["total"];
  kinds = [0];
  files = [""];
  #index = new Map();

  add(name, kind, file) {
    const key = `${name}\0${kind}\0${file}`;
    if (!this.#index.has(key)) {
      this.#index.set(key, this.names.length);
      this.names.push(name);
      this.kinds.push(kind);
      this.files.push(file);
    }
    return this.#index.get(key);
  }
}

function functionName(level, next, { kinds, binaries }) {
  if (level > 6 && next() < 0.03) return [MARKER, 8, ""];
  if (level > 5 && next() < 0.25) return [KERNEL[Math.floor(next() * KERNEL.length)], 2, "[kernel.kallsyms]"];
  const word = () => WORDS[Math.floor(next() * WORDS.length)];
  const kind = kinds[Math.floor(next() ** 2 * (kinds.length - 1))];
  const binary = binaries[Math.floor(next() ** 2 * binaries.length)];
  const file = next() < 0.6 ? `/src/${word()}/${word()}.rs:${Math.floor(next() * 900) + 1}` : binary;
  return [`${word()}::${word()}<${word()}>::${word()}_${word()}`, kind, file];
}

function grow(rows, names, next, container, level, total) {
  const share = next() * (level > 3 ? 0.3 : 0.02);
  let rest = Math.floor(total * (1 - share));
  const at = rows.length - 2;
  rows[at] = total;
  while (rest > total * 0.004 && rest > 1.2e6 && level < 60) {
    const part = Math.max(1, Math.floor(rest * (0.35 + 0.6 * next())));
    rows.push(level, part, 0, names.add(...functionName(level, next, container)));
    rest -= part;
    grow(rows, names, next, container, level + 1, part);
    rows[at] -= part;
  }
}

function merge(selected) {
  const names = new Names();
  const rows = [0, 0, 0, 0];
  selected.forEach((name, index) => {
    const container = CONTAINERS[name];
    const total = 24e9 / (index + 1);
    rows.push(1, total, 0, names.add("main", container.kinds[0], container.binaries[0]));
    grow(rows, names, random(name.length * 7919), container, 2, total);
    rows[1] += total;
  });
  const { names: list, kinds, files } = names;
  return {
    total: rows[1],
    names: list,
    kinds,
    files,
    rows,
    profiles: selected.length * 6,
    truncated_nodes: 12,
  };
}

function instant(text, now) {
  const units = { s: 1e3, m: 6e4, h: 36e5, d: 864e5 };
  const ago = /^now-(\d+)([smhd])$/.exec(text);
  if (ago) return now - ago[1] * units[ago[2]];
  return text === "now" ? now : Number(text);
}

function selected(query) {
  return Object.keys(CONTAINERS).filter((name) => {
    const [, operator, value] = /container(=~|=|!=)"([^"]*)"/.exec(query) ?? [];
    if (operator === "=~") return new RegExp(`^(?:${value})$`).test(name);
    return operator === undefined || (operator === "=" ? name === value : name !== value);
  });
}

function range(given) {
  const now = Date.now();
  return [instant(given.get("from") ?? "now-1h", now), instant(given.get("to") ?? "now", now)];
}

function series(given) {
  const [from, to] = range(given);
  const step = 1000 * Number.parseInt(given.get("step") ?? "10s");
  const next = random(42);
  const start = Math.floor(from / step) * step;
  const chosen = selected(given.get("query") ?? "");
  const groups = given.get("group_by") === "container" ? chosen : [""];
  const lines = groups.map((container) => ({
    labels: container === "" ? {} : { container },
    values: Array.from({ length: Math.ceil((to - start) / step) }, (_, at) =>
      at < 8
        ? 0
        : (chosen.length / groups.length) * step * 1e6 * (0.5 + 0.3 * Math.sin(at / 9) + 0.3 * next()),
    ),
  }));
  return { unit: "nanoseconds", step_ms: step, start_ms: start, series: lines, truncated: false };
}

const CPU = {
  type: "cpu",
  temporality: "delta",
  sample_types: [
    { type: "samples", unit: "count" },
    { type: "cpu", unit: "nanoseconds" },
  ],
  default_sample_type: "cpu",
};

function api(path, given) {
  const query = given.get("query") ?? "";
  if (/=~"[^"]*\*\*/.test(query))
    throw new Error(
      `parameter query: ${query} is not accepted: repetition operator without an expression at character 12`,
    );
  if (path === "types") return { types: [CPU] };
  if (path === "labels") return { labels: ["comm", "container", "exe", "node", "pid", "thread_name"] };
  if (path === "labels/container/values") return { values: Object.keys(CONTAINERS), truncated: false };
  if (path.startsWith("labels/")) return { values: ["one", "two", ""], truncated: true };
  if (path === "series") return series(given);
  const [from_ms, to_ms] = range(given);
  const about = {
    type: "cpu",
    sample_type: "cpu",
    unit: "nanoseconds",
    temporality: "delta",
    from_ms,
    to_ms,
    duration_ms: 60_000,
  };
  return {
    ...about,
    comments: ["19 Hz, cpu-clock", "dropped: 3 samples, ring buffer full"],
    ...merge(selected(query)),
  };
}

async function answer(request, response) {
  const { pathname, searchParams } = new URL(request.url, "http://localhost");
  if (pathname.startsWith("/api/v1/")) {
    response.setHeader("content-type", "application/json");
    try {
      const text = JSON.stringify(api(pathname.slice(8), searchParams));
      // No profile, but gzipped like one.
      response.end(searchParams.get("format") === "pprof" ? gzipSync(text) : text);
    } catch (error) {
      response.writeHead(400).end(JSON.stringify({ error: error.message }));
    }
    return;
  }
  const name = pathname === "/" ? "index.html" : pathname.slice(1);
  const type = TYPES[/\.\w+$/.exec(name)?.[0] ?? ""];
  if (!/^\w+\.\w+$/.test(name) || !type) return void response.writeHead(404).end();
  const body = await readFile(new URL(name, DIST)).catch(() => undefined);
  if (!body) return void response.writeHead(404).end();
  response.writeHead(200, { "content-type": type, "content-security-policy": CSP }).end(body);
}

const server = createServer((request, response) => void answer(request, response));
server.listen(Number(process.argv[2] ?? 7790), "127.0.0.1", () => {
  console.log(`http://127.0.0.1:${server.address().port}/`);
});
