// Drives a real browser against a running backend and does what a user does to find a hot function:
//   node test/browser.mjs URL FUNCTION LABEL=VALUE [--screenshot FILE]
// Exits 0 when every step shows what it should, 1 when one does not; then it names the step and prints both sides.
import assert from "node:assert/strict";
import { chromium } from "playwright-core";

const WAIT_MS = 15_000;
const PICK_MS = 2_000;
const BROWSER = {
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
  ],
};

function parseArguments(given) {
  const flag = given.indexOf("--screenshot");
  const screenshot = flag < 0 ? undefined : given.splice(flag, 2)[1];
  const [url, name, filter] = given;
  const [, label, value] = /^([^=]+)=(.*)$/s.exec(filter ?? "") ?? [];
  if (given.length !== 3 || label === undefined) {
    console.error("usage: browser.mjs URL FUNCTION LABEL=VALUE [--screenshot FILE]");
    process.exit(2);
  }
  return { url: new URL(url), name, label, value, screenshot };
}

/** What went wrong on the page without being seen there. */
function watch(page, origin) {
  const trouble = [];
  page.on("console", (message) => {
    if (message.type() === "error" || message.type() === "warning")
      trouble.push(`console: ${message.text()}`);
  });
  page.on("pageerror", (error) => trouble.push(`exception: ${error.message}`));
  page.on("request", (request) => {
    if (new URL(request.url()).origin !== origin) trouble.push(`request to another host: ${request.url()}`);
  });
  return trouble;
}

const frame = (page, name) =>
  page.getByRole("tree", { name: "Flame graph" }).getByRole("treeitem", { name, exact: true });

/** In CSS pixels; 0 while the frames are being replaced by those of newer data. */
async function frameWidth(page, name) {
  const box = await frame(page, name).first().boundingBox({ timeout: WAIT_MS });
  return Math.round(box?.width ?? 0);
}

/** Names of the frames on screen: the other side, when one is missing. */
async function visibleFrames(page) {
  const names = await page.getByRole("treeitem").allTextContents();
  return [...new Set(names)].slice(0, 60).join("\n  ");
}

async function waitForFrame(page, name) {
  try {
    await frame(page, name).first().waitFor({ timeout: WAIT_MS });
  } catch {
    assert.fail(`expected a frame ${name}, the flame graph shows:\n  ${await visibleFrames(page)}`);
  }
}

async function eventually(what, actual, expected) {
  const deadline = Date.now() + WAIT_MS;
  let last = await actual();
  while (last !== expected && Date.now() < deadline) {
    await new Promise((resolve) => setTimeout(resolve, 50));
    last = await actual();
  }
  assert.equal(last, expected, what);
}

/** Takes the option of the open list, typed as a user would to narrow it down. */
async function pick(page, title, option) {
  await page.getByRole("combobox", { name: title }).fill(option, { timeout: PICK_MS });
  // A value that is not offered can be used all the same; here it has to be offered.
  const list = page.getByRole("listbox", { name: title });
  await list.getByRole("option", { name: option, exact: true }).click({ timeout: PICK_MS });
}

/** Adds a filter; again from the start while the value is not offered, as a new program's is not yet. */
async function addFilter(page, label, value) {
  const deadline = Date.now() + WAIT_MS;
  for (;;) {
    try {
      await page.getByRole("button", { name: "+ Filter" }).click();
      await pick(page, "Filter by label", label);
      await pick(page, `Value of ${label}`, value);
      return;
    } catch (error) {
      const offered = await page.locator(".picker").getByRole("option").allTextContents();
      if (Date.now() > deadline)
        assert.fail(`${label}=${value} cannot be picked from: ${offered.join(", ")}\n${error.message}`);
      await page.keyboard.press("Escape");
    }
  }
}

function steps(page, { url, name, label, value }) {
  const search = page.getByRole("searchbox");
  const exact = `^${name.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&")}$`;
  return {
    "open the page": async () => {
      await page.goto(url.href);
      await frame(page, "total").waitFor({ timeout: WAIT_MS });
    },
    "choose the program by its label": async () => {
      await addFilter(page, label, value);
      await eventually(
        "the selector",
        () => page.getByLabel("Selector").inputValue(),
        `{${label}=${JSON.stringify(value)}}`,
      );
      await eventually("loading is over", () => page.getByRole("progressbar").isVisible(), false);
    },
    "find the function in the flame graph": () => waitForFrame(page, name),
    "see it at the top of the table by self time": async () => {
      const first = page.locator("#table-body tr").first();
      await eventually("first row of the table", () => first.getByRole("button").textContent(), name);
    },
    "zoom to it by a click": async () => {
      const before = await frameWidth(page, name);
      await frame(page, name).first().click();
      const { width } = await page.getByRole("tree", { name: "Flame graph" }).boundingBox();
      await eventually(
        `width of ${name}, ${before} px before`,
        async () => frameWidth(page, name),
        Math.round(width),
      );
    },
    "leave the zoom with Escape": async () => {
      await page.keyboard.press("Escape");
      await eventually("the address", () => new URL(page.url()).searchParams.get("zoom"), null);
    },
    "search it": async () => {
      await search.fill(exact);
      await eventually(
        "the matched share",
        async () => /^[\d.<]+ % in \d+ functions?$/.test(await page.locator("#matched").textContent()),
        true,
      );
      const row = page.locator("#table-body tr[aria-selected=true]").first();
      await eventually("marked row of the table", () => row.getByRole("button").textContent(), name);
      assert.ok(
        Number(await row.locator(".value").first().getAttribute("data-value")) > 0,
        "self time is above 0",
      );
    },
    "see how well its binary unwinds and is named": async () => {
      await page.getByRole("button", { name: "Binaries" }).click();
      const row = page.locator(`#binaries-body tr[data-binary="${value}"]`);
      await row.waitFor({ timeout: WAIT_MS });
      const values = await row.locator(".value").evaluateAll((cells) => cells.map((cell) => Number(cell.dataset.value)));
      assert.ok(values[0] > 0 && values[1] >= 0 && values[1] <= values[0], `total and truncated: ${values}`);
      assert.ok(values[2] >= 0 && values[2] <= 100, `unknown, in percent: ${values}`);
      assert.equal(new URL(page.url()).searchParams.get("view"), "binaries");
    },
    "follow the pprof link": async () => {
      const href = await page.locator("#download-pprof").getAttribute("href");
      const answer = await page.request.get(new URL(href, url).href);
      assert.equal(answer.status(), 200, `GET ${href}: ${await answer.text()}`);
      assert.equal((await answer.body()).subarray(0, 2).toString("hex"), "1f8b", "a profile is gzipped");
    },
  };
}

async function run(options) {
  const browser = await chromium.launch(BROWSER);
  const page = await browser.newPage({ viewport: { width: 1440, height: 900 } });
  const trouble = watch(page, options.url.origin);
  try {
    for (const [title, step] of Object.entries(steps(page, options))) {
      try {
        await step();
      } catch (error) {
        error.message = `${title}: ${error.message}`;
        throw error;
      }
      console.log(`ok: ${title}`);
    }
    assert.deepEqual(trouble, [], "nothing goes wrong behind the page");
    console.log("ok: no console errors, no request to another host");
  } finally {
    if (options.screenshot) await page.screenshot({ path: options.screenshot });
    await browser.close();
  }
}

try {
  await run(parseArguments(process.argv.slice(2)));
} catch (error) {
  console.error(`FAILED: ${error.message}`);
  process.exitCode = 1;
}
