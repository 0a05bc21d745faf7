// SPDX-License-Identifier: MIT
// Fails unless a report's page works in Chromium: nothing on the console is an error, nothing is
// loaded from elsewhere, every figure is there with its data, hovering, keys, search and the layer
// switch do something, text can be read, in light and in dark, at 380 and at 1440 pixels.
//
// Exits with 77 where Chromium does not start.
//
//     node page.mjs CHROMIUM PAGE.html "heading|heading|..." [FOLDER for screenshots]
//
// Speaks the DevTools protocol over pipes, so that it needs nothing from a registry.
import {spawn} from "node:child_process";
import {mkdtempSync, readFileSync, rmSync, writeFileSync} from "node:fs";
import {tmpdir} from "node:os";
import {join, resolve} from "node:path";
import {pathToFileURL} from "node:url";

const [chromium, page, headings, shots] = process.argv.slice(2);
const profile = mkdtempSync(join(tmpdir(), "weir-page-"));
const browser = spawn(chromium,
                      ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                       "--no-first-run", "--disable-extensions", "--hide-scrollbars",
                       "--force-device-scale-factor=1", "--remote-debugging-pipe",
                       `--user-data-dir=${profile}`, "about:blank"],
                      {stdio: ["ignore", "ignore", "ignore", "pipe", "pipe"]});
const end = code => {
  browser.once("exit", () => {
    rmSync(profile, {recursive: true, force: true, maxRetries: 5, retryDelay: 200});
    process.exit(code);
  });
  browser.kill("SIGKILL");
};
browser.on("error", e => { console.error(`${chromium}: ${e.message}`); process.exit(77); });
setTimeout(() => { console.error("no answer within 240 s"); end(1); }, 240000).unref();

const waiting = new Map(), listeners = [];
let last = 0, rest = "";
browser.stdio[4].on("data", part => {
  rest += part;
  const messages = rest.split("\0");
  rest = messages.pop();
  for (const text of messages) {
    const message = JSON.parse(text);
    if (message.id !== undefined) {
      const {done, failed} = waiting.get(message.id);
      waiting.delete(message.id);
      message.error ? failed(new Error(message.error.message)) : done(message.result);
    } else {
      for (const listener of listeners) listener(message);
    }
  }
});
const call = (method, params = {}, sessionId) => new Promise((done, failed) => {
  waiting.set(++last, {done, failed});
  browser.stdio[3].write(JSON.stringify({id: last, method, params, sessionId}) + "\0");
});

let failures = 0;
const expect = (holds, what) => {
  if (holds) return;
  ++failures;
  console.error(`FAILED: ${what}`);
};

/// The contrast of two colours as the WCAG has it.
const luminance = ([r, g, b]) => {
  const linear = c => (c /= 255) <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
  return .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
};
const contrast = (a, b) => {
  const [x, y] = [luminance(a), luminance(b)].sort((p, q) => q - p);
  return (x + .05) / (y + .05);
};

async function check(theme, width) {
  const where = `${theme}, ${width} px`;
  const {targetId} = await call("Target.createTarget", {url: "about:blank"});
  const {sessionId} = await call("Target.attachToTarget", {targetId, flatten: true});
  const send = (method, params) => call(method, params, sessionId);
  const problems = [];
  const listen = message => {
    if (message.sessionId !== sessionId) return;
    const {method, params} = message;
    if (method === "Runtime.exceptionThrown") problems.push(params.exceptionDetails.exception?.description ?? params.exceptionDetails.text);
    if (method === "Runtime.consoleAPICalled" && ["error", "warning"].includes(params.type)) problems.push(JSON.stringify(params.args));
    if (method === "Log.entryAdded" && params.entry.level === "error") problems.push(params.entry.text);
    if (method === "Network.requestWillBeSent" && !/^(file|data):/.test(params.request.url)) problems.push(`loads ${params.request.url}`);
  };
  listeners.push(listen);
  for (const domain of ["Page", "Runtime", "Log", "Network", "Accessibility"]) await send(`${domain}.enable`);
  await send("Emulation.setDeviceMetricsOverride", {width, height: width < 500 ? 800 : 900, deviceScaleFactor: 1, mobile: width < 500});
  await send("Emulation.setEmulatedMedia", {features: [{name: "prefers-color-scheme", value: theme}]});
  const loaded = new Promise(done => listeners.push(m => m.sessionId === sessionId && m.method === "Page.loadEventFired" && done()));
  await send("Page.navigate", {url: pathToFileURL(resolve(page)).href});
  await loaded;
  const evaluate = async expression => {
    const r = await send("Runtime.evaluate", {expression, returnByValue: true, awaitPromise: true});
    if (r.exceptionDetails) throw new Error(r.exceptionDetails.exception?.description ?? r.exceptionDetails.text);
    return r.result.value;
  };
  const hover = async at => {
    await send("Input.dispatchMouseEvent", {type: "mouseMoved", x: at[0], y: at[1]});
    await evaluate("new Promise(r => requestAnimationFrame(() => r()))");
  };
  /// The middle of an element, scrolled into view; null if there is none.
  const middle = selector => evaluate(`(async () => { const e = document.querySelector(${JSON.stringify(selector)});
    if (!e) return null; e.scrollIntoView({block: "center", inline: "center", behavior: "instant"});
    for (let i = 0; i < 3; ++i) await new Promise(requestAnimationFrame);
    const b = e.getClientRects()[0]; return [b.left + b.width / 2, b.top + b.height / 2]; })()`);
  const key = async name => {
    await send("Input.dispatchKeyEvent", {type: "keyDown", key: name, code: name});
    await send("Input.dispatchKeyEvent", {type: "keyUp", key: name, code: name});
  };

  expect(await evaluate("document.documentElement.dataset.ready") === "1", `${where}: the script did not reach its end`);
  expect(await evaluate("document.documentElement.dataset.theme") === theme, `${where}: the page has another theme`);
  const found = await evaluate("[...document.querySelectorAll('h2')].map(h => h.textContent)");
  for (const heading of headings.split("|")) expect(found.includes(heading), `${where}: no section '${heading}' among ${found}`);
  const figures = await evaluate(`[...document.querySelectorAll("figure")].map(f => ({
    name: f.querySelector("figcaption")?.textContent, points: +f.dataset.points,
    drawn: f.querySelectorAll("svg rect, svg path, .tokens span, code, td, .meter").length,
    wide: f.getBoundingClientRect().width}))`);
  expect(figures.length >= found.length - 1, `${where}: ${figures.length} figures`);
  for (const f of figures) expect(f.points > 0 && f.drawn > 0 && f.wide > 100 && f.name, `${where}: figure ${JSON.stringify(f)}`);
  const overflow = await evaluate("document.documentElement.scrollWidth - innerWidth");
  expect(overflow <= 0, `${where}: the page is ${overflow} px too wide`);

  const colours = await evaluate(`(() => {
    const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const rgb = c => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1);
      return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3); };
    const style = s => getComputedStyle(document.querySelector(s));
    const pairs = [["body", "body"], [".card p.soft", ".card"], ["footer", "body"]];
    const all = pairs.filter(p => document.querySelector(p[0])).map(([t, b]) => [t, rgb(style(t).color), rgb(style(b).backgroundColor)]);
    for (const s of [...document.querySelectorAll(".tokens span:not(.off)")].slice(0, 200))
      all.push(["token", rgb(getComputedStyle(s).color), rgb(getComputedStyle(s).backgroundColor)]);
    return all; })()`);
  for (const [what, ink, paper] of colours) {
    expect(contrast(ink, paper) >= 4.5, `${where}: ${what} has contrast ${contrast(ink, paper).toFixed(2)} (${ink} on ${paper})`);
  }

  const tip = () => evaluate("getComputedStyle(tip).visibility === 'visible' ? tip.textContent : ''");
  const cell = await middle("rect.cell");
  if (cell) {
    await hover(cell);
    expect(/%/.test(await tip()), `${where}: hovering over a cell says '${await tip()}'`);
    await evaluate("document.querySelector('rect.cell').closest('svg').focus()");
    await key("ArrowRight");
    expect(/%/.test(await evaluate('$("say").textContent')), `${where}: an arrow key in a heat map says nothing`);
  }
  const curve = await middle("path.series");
  if (curve) {
    await hover(curve);
    expect((await tip()).includes("\n"), `${where}: hovering over a curve says '${await tip()}'`);
  }
  const band = await middle("path.link");
  if (band) {
    await evaluate("document.querySelector('path.link').dispatchEvent(new PointerEvent('pointermove', {bubbles: true, clientX: 9, clientY: 9}))");
    expect(/tokens/.test(await tip()), `${where}: hovering over a band says '${await tip()}'`);
    await evaluate("document.querySelector('path.link').ownerSVGElement.focus()");
    await key("ArrowDown");
    const said = await tip();
    expect(/expert 1\n\d+ tokens/.test(said), `${where}: an arrow key in the flow says '${said}'`);
    await key("ArrowRight");
    expect(await tip() !== said, `${where}: an arrow key does not go to the next layer of the flow`);
    expect(await evaluate("document.querySelectorAll('path.link.on').length") > 0, `${where}: no band of the expert is lit`);
  }
  // Of each map, and of the flow, something says a value, its interval, and what chance would give.
  const said = await evaluate(`[...document.querySelectorAll("figure")].filter(f => f.querySelector(".cell, .link")).map(f => [
    f.querySelector("figcaption").textContent,
    [...f.querySelectorAll(".cell, .link")].map(e => {
      e.dispatchEvent(new PointerEvent("pointermove", {bubbles: true, clientX: 9, clientY: 9}));
      return $("tip").textContent; })])`);
  for (const [figure, tips] of said) {
    const whole = tips.filter(t => /\d %? ?\([\d.]+ % to [\d.]+ %\)\nby chance: [\d.]+ %$/.test(t));
    expect(whole.length > 0, `${where}: no interval in '${figure}': ${JSON.stringify(tips[1])}`);
  }
  const token = await middle(".tokens span:nth-child(5)");
  if (token) {
    await hover(token);
    const said = await evaluate('$("detail").textContent');
    expect(/expert \d+/.test(said), `${where}: hovering over a token says '${said}'`);
    await evaluate("document.querySelector('.tokens span.at').focus()");
    await key("ArrowRight");
    expect(await evaluate('$("detail").textContent') !== said, `${where}: an arrow key does not go to the next token`);
    await evaluate(`$("find").value = document.querySelector(".tokens span:nth-child(5)").textContent.trim() || " "; $("find").dispatchEvent(new Event("input"))`);
    expect(await evaluate("document.querySelectorAll('.tokens span.hit').length") > 0, `${where}: a search finds nothing`);
    expect(/times/.test(await evaluate('$("found").textContent')), `${where}: a search says nothing`);
    await evaluate(`$("find").value = ""; $("find").dispatchEvent(new Event("input"))`);
    if (await evaluate('+$("layer").max > 0')) {
      const before = await evaluate('$("main").textContent');
      await evaluate('$("layer").value = 1; $("layer").dispatchEvent(new Event("input"))');
      expect(await evaluate('$("main").textContent') !== before, `${where}: another layer changes nothing`);
      await evaluate('$("layer").value = 0; $("layer").dispatchEvent(new Event("input"))');
    }
    await evaluate("document.querySelector('.chips button').click()");
    expect(await evaluate("document.querySelectorAll('.tokens span.off').length") > 0, `${where}: one expert alone changes nothing`);
    await evaluate("document.querySelector('.chips button').click()");
  }
  await evaluate("document.querySelector('figure details')?.setAttribute('open', '')");
  await evaluate("new Promise(r => setTimeout(r, 60))");
  expect(await evaluate("!document.querySelector('figure details') || document.querySelectorAll('figure details td').length > 0"), `${where}: no numbers behind a figure`);
  await evaluate("document.querySelector('figure details')?.removeAttribute('open')");
  const other = theme === "dark" ? "light" : "dark";
  const paper = () => evaluate("getComputedStyle(document.body).backgroundColor");
  const before = await paper();
  await evaluate(`document.querySelector('[data-set=${other}]').click()`);
  expect(await paper() !== before, `${where}: the other theme looks the same`);
  await evaluate("document.querySelector('[data-set=auto]').click()");
  expect(await paper() === before, `${where}: the theme does not come back`);

  const {nodes} = await send("Accessibility.getFullAXTree");
  const named = ["image", "button", "slider", "combobox", "searchbox", "link", "figure", "region"];
  for (const node of nodes) {
    if (node.ignored || !named.includes(node.role?.value)) continue;
    if (node.role.value === "figure") continue;
    expect(node.name?.value, `${where}: a ${node.role.value} has no name`);
  }
  const {data: pdf} = await send("Page.printToPDF", {printBackground: true});
  expect(Buffer.from(pdf, "base64").length > 10000, `${where}: printing gives nothing`);
  if (shots) {
    await hover([2, 2]);
    await evaluate("scrollTo(0, 0)");
    const height = await evaluate("document.documentElement.scrollHeight");
    const {data} = await send("Page.captureScreenshot", {format: "png", captureBeyondViewport: true,
                                                         clip: {x: 0, y: 0, width, height, scale: 1}});
    writeFileSync(join(shots, `${theme}-${width}.png`), Buffer.from(data, "base64"));
  }
  for (const problem of problems) expect(false, `${where}: ${problem}`);
  await call("Target.closeTarget", {targetId});
}

const started = await Promise.race([call("Browser.getVersion"), new Promise(done => setTimeout(done, 60000))]);
if (!started) {
  console.log(`skipped: ${chromium} does not start`);
  end(77);
}
try {
  expect(readFileSync(page).length < 3000000, "the page has 3 MB or more");
  for (const theme of ["light", "dark"]) for (const width of [380, 1440]) await check(theme, width);
} catch (e) {
  console.error(e);
  ++failures;
}
console.log(failures ? `${failures} failures` : "the page works");
end(failures ? 1 : 0);
