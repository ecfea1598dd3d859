import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { Session } from "node:inspector/promises";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { Page, Server, freeze, recorder } from "./fakes.mjs";

// HELPER: the URL of a copy that is to keep the same rules.
const FILE = new URL(process.env.HELPER ?? "../../../assistream_flask/static/assistream.js", import.meta.url);
const { createAssistream, parts, text } = await import(FILE.href);

/** A test with a page, a server, a thread "t" and the helper. */
const rule = (name, body, options) =>
  test(name, async () => {
    const page = new Page(options);
    try {
      const server = new Server();
      const thread = server.thread("t");
      const api = createAssistream({ baseUrl: "http://server.test/p", fetch: server.fetch, EventSource: server.EventSource });
      const streams = () => server.requests.filter(({ method }) => method === "STREAM").map(({ url }) => url);
      const posts = () => server.requests.filter(({ method }) => method === "POST");
      const gets = () => server.requests.filter(({ method }) => method === "GET");
      /** Follows a promise without waiting for it. */
      const watch = (promise) => {
        const state = {};
        promise.then((value) => Object.assign(state, { value, over: true }), (error) => Object.assign(state, { error, over: true }));
        return state;
      };
      const load = async (set = recorder(page), options) => {
        const state = watch(api.loadThread("t", set, options));
        await page.pass(100);
        if (state.error) throw state.error;
        return Object.assign(set, { state });
      };
      await body({ page, server, thread, api, streams, posts, gets, watch, load });
      assert.deepEqual(page.reported, []);
    } finally {
      page.close();
    }
  });

const ids = (entries) => entries.map(({ message }) => message.id);

// ---- loadThread

rule("loadThread resolves after its first set, with the whole thread", async ({ server, thread, load, gets }) => {
  server.page = 2;
  for (let i = 0; i < 7; i++) server.say(thread, `${i}`);
  const set = await load();
  assert.equal(set.calls.length, 1);
  assert.deepEqual(set.last, thread.entries);
  assert.deepEqual(set.state.value, thread.entries);
  assert.deepEqual(gets().map(({ url }) => new URL(url).searchParams.get("limit")), ["200", "200", "200"]);
});

rule("an empty thread is set too", async ({ load }) => assert.deepEqual((await load()).calls, [[]]));

for (const [status, code] of [[404, "thread_not_found"], [401, "unauthenticated"], [403, "foreign_origin"], [400, "invalid_value"]])
  rule(`a ${status} ends the subscription with the server's code`, async ({ page, server, api, watch, streams }) => {
    server.failOpen = () => true;
    server.fault = () => [status, {}, { error: { code, message: "No." } }];
    const set = recorder(page);
    const state = watch(api.loadThread("t", set));
    await page.pass(60_000);
    assert.deepEqual([state.error.code, state.error.status, state.error.message], [code, status, "No."]);
    assert.ok(state.error instanceof Error);
    assert.equal(set.calls.length, 0);
    assert.equal(streams().length, 1);
    assert.equal(page.timers, 0);
  });

rule("a thread that was deleted while nobody listened is set to nothing", async ({ page, server, thread, load }) => {
  server.say(thread, "hello");
  const set = await load();
  server.threads.delete("t");
  server.cut([...server.sources][0]);
  await page.pass(2000);
  assert.deepEqual(set.last, []);
  assert.equal(page.timers, 0);
});

rule("429 and 503 are waited out for as long as Retry-After says", async ({ page, server, api, watch, streams }) => {
  for (const status of [429, 503]) {
    server.failOpen = () => true;
    server.fault = () => [status, { "Retry-After": "7" }, { error: { code: "later", message: "Later." } }];
    const before = streams().length;
    const stop = new AbortController();
    const state = watch(api.loadThread("t", recorder(page), { signal: stop.signal }));
    await page.pass(1000);
    server.failOpen = () => false;
    server.fault = () => undefined;
    await page.pass(5800);
    assert.equal(streams().length, before + 1);
    await page.pass(2000);
    assert.equal(streams().length, before + 2);
    assert.deepEqual(state.value, []);
    stop.abort();
    await page.pass();
  }
});

rule("an abort before loadThread sends nothing", async ({ page, server, api, watch }) => {
  const stop = new AbortController();
  stop.abort();
  const state = watch(api.loadThread("t", recorder(page), { signal: stop.signal }));
  await page.pass(1000);
  assert.equal(state.error.name, "AbortError");
  assert.equal(server.requests.length, 0);
});

rule("an abort before the first set rejects; one after it ends the stream", async ({ page, server, thread, api, watch, load }) => {
  const stop = new AbortController();
  const state = watch(api.loadThread("t", recorder(page), { signal: stop.signal }));
  stop.abort("a reason that is no error");
  await page.pass();
  assert.equal(state.error.name, "AbortError");
  const other = new AbortController();
  const set = await load(undefined, { signal: other.signal });
  other.abort();
  server.say(thread, "unheard");
  await page.pass(1000);
  assert.equal(set.calls.length, 1);
  assert.equal(server.sources.size, 0);
  assert.equal(page.timers, 0);
});

rule("an abort rejects with an AbortError, whatever its reason", async ({ page, api, watch }) => {
  const stop = new AbortController();
  const state = watch(api.loadThread("t", recorder(page), { signal: stop.signal }));
  stop.abort(new Error("left the page"));
  await page.pass();
  assert.equal(state.error.name, "AbortError");
});

rule("leaving and coming back at once keeps the one stream", async ({ page, server, api, watch, streams }) => {
  const set = recorder(page);
  const stop = new AbortController();
  const first = watch(api.loadThread("t", set, { signal: stop.signal }));
  stop.abort();
  const second = watch(api.loadThread("t", set));
  await page.pass(1000);
  assert.equal(first.error.name, "AbortError");
  assert.deepEqual(second.value, []);
  assert.equal(streams().length, 1);
  assert.equal(server.sources.size, 1);
});

rule("a set that comes back gets the thread again, as another array", async ({ page, server, thread, api, load, streams }) => {
  server.say(thread, "hello");
  await load();
  const set = recorder(page);
  const stop = new AbortController();
  await Promise.all([api.loadThread("t", set, { signal: stop.signal }), page.pass(50)]);
  stop.abort();
  set.fresh = true;
  await Promise.all([api.loadThread("t", set), page.pass(50)]);
  assert.equal(set.calls.length, 2);
  assert.equal(set.calls[0][0], set.calls[1][0]);
  assert.equal(streams().length, 1);
});

rule("all subscriptions of a thread share one stream", async ({ page, server, thread, api, load, streams }) => {
  const stop = new AbortController();
  await load(undefined, { signal: stop.signal });
  const set = await load();
  const running = api.run("t", "a", await load());
  await page.pass(100);
  assert.equal(streams().length, 1);
  stop.abort();
  server.finish(thread, thread.entries[0]);
  await page.pass(100);
  await running;
  assert.equal(server.sources.size, 1);
  assert.deepEqual(set.last, thread.entries);
});

rule("one set given twice is called once a frame", async ({ page, server, thread, api, load }) => {
  const set = await load();
  await load(set);
  const running = api.addMessageAndRun("t", "hello", "a", set);
  await page.pass(100);
  assert.deepEqual(set.last, thread.entries);
  server.finish(thread, thread.entries[1]);
  await page.pass(100);
  await running;
  server.say(thread, "still here");
  await page.pass(100);
  assert.deepEqual(set.last, thread.entries);
});

rule("a set that throws is reported and the others go on", async ({ page, server, thread, api, load }) => {
  const wrong = new Error("a bug in the page");
  const state = api.loadThread("t", () => { throw wrong; });
  const set = await load();
  await state;
  assert.deepEqual(set.calls, [[]]);
  assert.deepEqual(page.reported.splice(0), [wrong]);
  server.say(thread, "hello");
  await page.pass(100);
  assert.deepEqual(set.last, thread.entries);
  page.reported.length = 0;
});

for (const [what, call] of [
  ["thread_id", (api) => api.loadThread(undefined, () => {})],
  ["thread_id", (api) => api.addMessage(7, "hello")],
  ["thread_id", (api) => api.run("", "a", () => {})],
  ["set", (api) => api.loadThread("t")],
  ["set", (api) => api.run("t", "a", "set")],
  ["assistant", (api) => api.run("t")],
  ["assistant", (api) => api.addMessageAndRuns("t", "hello", "a", () => {})],
  ["thread_id", (api) => api.deleteThread("")],
  ["thread_id", (api) => api.cancelRun(undefined, "run_1")],
  ["run_id", (api) => api.cancelRun("t")],
  ["outputs", (api) => api.submitToolOutputs("t", "run_1", { call_1: "out" })],
  ["run_id", (api) => api.approve("t", "", "call_1")],
  ["thread_id", (api) => api.deny(null, "run_1", "call_1")],
])
  rule(`a wrong ${what} rejects with what was got: ${call}`, async ({ page, server, api }) => {
    await assert.rejects(() => call(api), (error) =>
      error instanceof TypeError && error.message.includes(what) && /must be .*, got /.test(error.message));
    await page.pass(100);
    assert.equal(server.requests.length, 0);
  });

// ---- when set is called

rule("set is called once a frame, however much happened", async ({ page, server, thread, load }) => {
  server.say(thread, "hello");
  const entry = server.start(thread, "a");
  const set = await load();
  server.delay = () => 0;
  await page.pass(16 - (page.now % 16));
  for (let i = 0; i < 50; i++) {
    server.delta(thread, entry, `${i} `);
    await page.pass(0);
  }
  assert.equal(set.calls.length, 1);
  await page.pass(16);
  assert.equal(set.calls.length, 2);
  assert.deepEqual(set.last, thread.entries);
});

rule("what did not change stays the same object", async ({ page, server, thread, load }) => {
  server.say(thread, "hello");
  const [one, two] = [server.start(thread, "a"), server.start(thread, "b")];
  server.delta(thread, one, "x");
  const set = await load();
  server.delta(thread, two, "y");
  await page.pass(100);
  const [before, after] = set.calls;
  assert.deepEqual([0, 1, 2].map((i) => before[i] === after[i]), [true, true, false]);
  assert.equal(before[2].run, after[2].run);
  assert.equal(text(before[2]), "");
  assert.equal(text(after[2]), "y");
});

rule("a hidden tab keeps receiving, without frames", async ({ page, server, thread, load }) => {
  const set = await load();
  page.hide(true);
  server.say(thread, "hello");
  await page.pass(6);
  assert.deepEqual(set.last, thread.entries);
});

rule("a hidden tab gets no more sets than a visible one, and a run's end at once", async ({ page, server, thread, api, load, watch }) => {
  const set = await load();
  server.delay = () => 0;
  const running = watch(api.run("t", "a"));
  await page.pass(100);
  const [entry] = thread.entries;
  page.hide(true);
  await page.pass(100);
  const before = set.calls.length;
  for (let i = 0; i < 100; i++) {
    server.delta(thread, entry, `${i} `);
    await page.pass(10);
  }
  const calls = set.calls.length - before;
  assert.ok(calls >= 8 && calls <= 21, `${calls} calls in a second`);
  // Timers of hidden tabs may wait a minute: what needs none must not wait for one.
  await page.pass(1000);
  const throttled = globalThis.setTimeout;
  globalThis.setTimeout = (fn, ms, ...args) => throttled(fn, ms ? 60_000 : ms, ...args);
  server.delta(thread, entry, "after a pause ");
  await page.pass(1);
  assert.deepEqual(set.last, thread.entries);
  server.delta(thread, entry, "waits ");
  await page.pass(1);
  assert.ok(!text(set.last[0]).endsWith("waits "));
  server.finish(thread, entry);
  await page.pass(1);
  assert.deepEqual(set.last, thread.entries);
  assert.equal(running.value.status, "completed");
  globalThis.setTimeout = throttled;
});

rule("text that waits in a hidden tab is there in the first frame once it is looked at", async ({ page, server, thread, load }) => {
  const entry = server.start(thread, "a");
  const set = await load();
  server.delay = () => 0;
  page.hide(true);
  server.delta(thread, entry, "one ");
  await page.pass(1);
  const throttled = globalThis.setTimeout;
  globalThis.setTimeout = (fn, ms, ...args) => throttled(fn, ms ? 60_000 : ms, ...args);
  server.delta(thread, entry, "two ");
  await page.pass(1);
  globalThis.setTimeout = throttled;
  assert.equal(text(set.last[0]), "one ");
  page.hide(false);
  await page.pass(20);
  assert.equal(text(set.last[0]), "one two ");
});

rule("a tab that is hidden before its frame gets the set all the same", async ({ page, server, thread, load }) => {
  const set = await load();
  await page.pass(16 - (page.now % 16) + 1);
  server.delay = () => 0;
  server.say(thread, "hello");
  await page.pass(1);
  page.hide(true);
  assert.equal(set.calls.length, 1);
  await page.pass(1000);
  assert.deepEqual(set.last, thread.entries);
});

rule("without a document there are no frames to wait for", async ({ page, server, thread, load }) => {
  const set = await load(recorder(page, { onePerFrame: false }));
  server.say(thread, "hello");
  await page.pass(6);
  assert.deepEqual(set.last, thread.entries);
}, { dom: false });

rule("a delta costs the same in a long thread and in a long text", async ({ page, server, thread, load }) => {
  server.page = 100_000;
  for (let i = 0; i < 20_000; i++) thread.entries.push({ assistant_id: null, message: server.message(thread, "user"), run: null, steps: [] });
  const entry = server.start(thread, "a");
  const seen = [];
  await load((entries) => seen.push(entries));
  const [source] = server.sources;
  const began = process.hrtime.bigint();
  for (let i = 0; i < 20_000; i++) {
    const data = JSON.stringify({ id: entry.message.id, delta: { content: [{ index: 0, type: "text", text: { value: "0123456789".repeat(10) } }] } });
    source.dispatchEvent(new MessageEvent("thread.message.delta", { data, lastEventId: `${thread.epoch}-${++thread.offset}` }));
  }
  const took = Number(process.hrtime.bigint() - began) / 1e6;
  await page.pass(100);
  assert.equal(text(seen.at(-1).at(-1)).length, 2_000_000);
  assert.ok(took < 2000, `20,000 deltas took ${took} ms`);
});

/** The helper, and what tells how often each of its blocks ran since it was last asked: V8 counts. */
const counted = async (name) => {
  const session = new Session();
  session.connect();
  await session.post("Profiler.enable");
  await session.post("Profiler.startPreciseCoverage", { callCount: true, detailed: true });
  // Only in what is compiled from now on are blocks counted.
  const address = `${FILE}?${name}`;
  const { createAssistream } = await import(address);
  const ran = async () => {
    const { result } = await session.post("Profiler.takePreciseCoverage");
    return (result.find(({ url }) => url === address)?.functions ?? []).flatMap(({ functionName, ranges }) =>
      ranges.filter(({ count }) => count).map(({ startOffset, count }) => [functionName, startOffset, count]));
  };
  return { createAssistream, ran, close: () => session.disconnect() };
};

rule("a delta does the same work in a thread of 10 messages and in one of 1,000", async ({ page, server, watch }) => {
  const { createAssistream, ran, close } = await counted("deltas");
  const work = [];
  for (const length of [10, 1000]) {
    const thread = server.thread(`t${length}`);
    const entries = [server.start(thread, "a")];
    while (thread.entries.length < length) server.say(thread, "hello");
    entries.push(server.start(thread, "b"));
    const api = createAssistream({ baseUrl: "http://server.test/p", fetch: server.fetch, EventSource: server.EventSource });
    const set = recorder(page);
    const stop = new AbortController();
    watch(api.loadThread(thread.id, set, stop));
    await page.pass(1000);
    for (const entry of entries) {
      server.delta(thread, entry, "first");
      await page.pass(100);
      await ran();
      for (let i = 0; i < 3; i++) {
        server.delta(thread, entry, `${i}`);
        await page.pass(100);
      }
      work.push(await ran());
    }
    assert.equal(set.calls.length, 9);
    assert.deepEqual(set.last, thread.entries);
    stop.abort();
    await page.pass();
  }
  close();
  const [first, ...others] = work;
  assert.ok(first.length > 20);
  for (const other of others) assert.deepEqual(other, first);
});

rule("after a snapshot, a long thread is compared page by page", async ({ page, server, thread, watch }) => {
  const { createAssistream, ran, close } = await counted("pages");
  const open = server.start(thread, "a");
  for (let i = 0; i < 499; i++) server.say(thread, `${i}`);
  const api = createAssistream({ baseUrl: "http://server.test/p", fetch: server.fetch, EventSource: server.EventSource });
  const set = recorder(page);
  watch(api.loadThread("t", set));
  await page.pass(500);
  // As it may have changed, all pages after it come again.
  server.delta(thread, open, "x");
  thread.epoch = "new";
  server.cut([...server.sources][0]);
  const work = [];
  for (let i = 0; i < 1000; i++) {
    await ran();
    await page.pass(1);
    work.push((await ran()).reduce((sum, [, , count]) => sum + count, 0));
  }
  close();
  assert.deepEqual(set.last, thread.entries);
  const total = work.reduce((sum, one) => sum + one);
  assert.ok(total > 20_000, `${total}`);
  assert.ok(Math.max(...work) < total / 5, `${Math.max(...work)} of ${total}`);
});

// ---- the stream

rule("a cut stream goes on from its place", async ({ page, server, thread, load, streams }) => {
  server.say(thread, "one");
  const set = await load();
  server.say(thread, "two");
  await page.pass(100);
  server.cut([...server.sources][0]);
  server.say(thread, "three");
  await page.pass(600);
  assert.deepEqual(streams().map((url) => new URL(url).searchParams.get("last_event_id")), [null, `${thread.epoch}-2`]);
  assert.equal(streams()[0], "http://server.test/p/threads/t/events");
  assert.deepEqual(set.last, thread.entries);
});

rule("streams that fail are opened every 3 s for half a minute, then up to 15 s apart, and at once again after an event", async (
  { page, server, thread, load }) => {
  await load();
  const opened = [];
  server.failOpen = () => opened.push(page.now);
  server.delay = () => 0;
  const fail = async (ms) => {
    opened.length = 0;
    const began = page.now;
    server.cut([...server.sources][0]);
    await page.pass(ms);
    return [began, ...opened].slice(0, -1).map((at, i) => opened[i] - at);
  };
  const waits = await fail(150_000);
  let away = 0;
  for (const [i, wait] of waits.entries()) {
    const most = Math.min(away < 30_000 ? 3000 : 15_000, 500 * 2 ** i);
    assert.ok(wait >= most / 2 - 1 && wait <= most + 1, `wait ${i} was ${wait}`);
    away += wait;
  }
  assert.ok(waits.length > 16);
  server.failOpen = () => false;
  await page.pass(20_000);
  server.say(thread, "hello");
  await page.pass(20);
  server.failOpen = () => opened.push(page.now);
  assert.ok((await fail(2000))[0] <= 501);
});

for (const type of ["online", "pageshow", "visibilitychange"])
  rule(`${type} brings a lost stream back at once`, async ({ page, server, thread, load }) => {
    const set = await load();
    server.failOpen = () => true;
    server.fault = () => "refuse";
    server.cut([...server.sources][0]);
    await page.pass(60_000);
    server.failOpen = () => false;
    server.fault = () => undefined;
    server.say(thread, "hello");
    // The probe, then the stream: each is woken.
    for (let i = 0; i < 3; i++) {
      page.fire(type);
      await page.pass(50);
    }
    assert.deepEqual(set.last, thread.entries);
  });

rule("coming back replaces a stream that has been silent for 20 s, and no other", async ({ page, server, load, streams }) => {
  await load();
  page.sleep(15_000);
  page.fire("pageshow");
  assert.equal(streams().length, 1);
  page.sleep(15_000);
  page.hide(true);
  assert.equal(streams().length, 1);
  page.hide(false);
  assert.equal(streams().length, 2);
  page.fire("pageshow");
  assert.equal(streams().length, 2);
  await page.pass(100);
  assert.equal(server.sources.size, 1);
});

rule("a stream without a ping for 40 s is replaced", async ({ page, server, thread, load, streams }) => {
  const set = await load();
  for (let i = 0; i < 8; i++) {
    await page.pass(15_000);
    server.ping();
  }
  assert.equal(streams().length, 1);
  server.sources.clear();
  server.say(thread, "unheard");
  await page.pass(46_000);
  assert.equal(streams().length, 2);
  assert.deepEqual(set.last, thread.entries);
});

rule("a clock that is set back keeps neither a dead stream nor the text of a hidden tab", async ({ page, server, thread, load, streams }) => {
  const set = await load();
  page.wrong = -3_600_000;
  server.sources.clear();
  server.say(thread, "unheard");
  await page.pass(46_000);
  assert.equal(streams().length, 2);
  assert.deepEqual(set.last, thread.entries);
  page.wrong = -7_200_000;
  page.hide(true);
  await page.pass(100);
  server.say(thread, "hidden");
  await page.pass(6);
  assert.deepEqual(set.last, thread.entries);
});

rule("a stream that is held back is tried again every minute, though the clock is set back", async ({ page, server, load, streams }) => {
  server.holds = () => true;
  await load();
  await page.pass(60_000);
  page.wrong = -3_600_000;
  const tried = streams().length;
  await page.pass(150_000);
  assert.ok(streams().length >= tried + 2, `${streams().length - tried}`);
});

rule("an event is never applied twice", async ({ page, server, thread, load }) => {
  const entry = server.start(thread, "a");
  const set = await load();
  server.twist = () => "repeat";
  for (let i = 0; i < 5; i++) server.delta(thread, entry, `${i} `);
  await page.pass(100);
  assert.deepEqual(set.last, thread.entries);
});

rule("a hole in the events is healed by a snapshot", async ({ page, server, thread, load, streams }) => {
  const entry = server.start(thread, "a");
  const set = await load();
  server.twist = () => "skip";
  server.delta(thread, entry, "lost ");
  await page.pass(10);
  server.twist = () => undefined;
  server.delta(thread, entry, "found ");
  await page.pass(1000);
  assert.deepEqual(set.last, thread.entries);
  assert.equal(streams()[1], streams()[0]);
  assert.ok(set.calls.every(([{ message }]) => message.content.length === 0 || message.content[0].text.value !== "found "));
});

rule("unknown events and fields are ignored", async ({ page, server, thread, load }) => {
  const set = await load();
  const [source] = server.sources;
  source.dispatchEvent(new MessageEvent("thread.message.sung", { data: "{}", lastEventId: `${thread.epoch}-9` }));
  const entry = server.start(thread, "a");
  server.delta(thread, entry, "x");
  thread.log.at(-1).data = JSON.stringify({ ...JSON.parse(thread.log.at(-1).data), mood: "good" });
  await page.pass(100);
  assert.deepEqual(set.last, thread.entries);
});

rule("a deleted thread is set to nothing, and what waits for it rejects", async ({ page, server, thread, api, load, watch }) => {
  server.say(thread, "hello");
  const set = await load();
  const running = watch(api.run("t", "a", set));
  await page.pass(100);
  server.delete(thread);
  await page.pass(100);
  assert.deepEqual(set.last, []);
  assert.equal(running.error.code, "thread_not_found");
  assert.equal(running.error.runs.length, 1);
  assert.equal(server.sources.size, 0);
  assert.equal(page.timers, 0);
});

rule("a thread that is deleted in the frame of a delta is set to nothing", async ({ page, server, thread, load }) => {
  const entry = server.start(thread, "a");
  const set = await load();
  server.delta(thread, entry, "x");
  server.delete(thread);
  await page.pass(100);
  assert.deepEqual(set.calls.slice(1), [[]]);
});

rule("a quiet stream that is ended now and then is opened again soon each time", async ({ page, server, load, streams }) => {
  await load();
  for (let i = 1; i < 10; i++) {
    server.ping();
    server.cut([...server.sources][0]);
    await page.pass(550);
    assert.equal(streams().length, i + 1);
  }
});

rule("a thread that ended while its pages came is not set any more", async ({ page, server, thread, api, watch }) => {
  for (let i = 0; i < 3; i++) server.say(thread, `${i}`);
  server.page = 2;
  const set = recorder(page);
  server.delay = () => 50;
  const state = watch(api.loadThread("t", set));
  await page.pass(110);
  server.delay = () => 1;
  server.delete(thread);
  server.threads.set("t", thread);
  await page.pass(1000);
  assert.equal(state.error.code, "thread_not_found");
  assert.equal(set.calls.length, 0);
});

rule("who leaves a stream that has ended does not touch the next one", async ({ page, server, thread, api, load, streams }) => {
  const stop = new AbortController();
  await load(undefined, { signal: stop.signal });
  server.delete(thread);
  await page.pass(100);
  server.threads.set("t", thread);
  await load();
  stop.abort();
  await page.pass(100);
  await load();
  assert.equal(streams().length, 2);
});

// ---- the state

rule("events shape messages, parts, annotations, refusals, runs and steps as the server does", async ({ page, server, thread, load }) => {
  const set = await load();
  server.say(thread, "hello");
  const entry = server.start(thread, "a");
  const steps = [
    () => server.begin(thread, entry),
    () => server.think(thread, entry, "Let me "),
    () => server.think(thread, entry, "think."),
    () => server.delta(thread, entry, "Hello"),
    () => server.delta(thread, entry, " you"),
    () => server.annotate(thread, entry, { type: "url_citation", index: 3, url: "http://a.test" }),
    () => server.annotate(thread, entry, { type: "url_citation", index: 9, url: "http://b.test" }),
    () => server.delta(thread, entry, "But no", "refusal"),
    () => server.delta(thread, entry, ".", "refusal"),
    () => server.finish(thread, entry, "incomplete"),
  ];
  for (const step of steps) {
    step();
    await page.pass(100);
    assert.deepEqual(set.last, thread.entries);
  }
  assert.equal(text(set.last[1]), "Hello you\n\nBut no.");
});

rule("a message that is created again replaces the first", async ({ page, server, thread, load }) => {
  const entry = server.say(thread, "hello");
  const set = await load();
  entry.message.metadata.seen = true;
  server.emit(thread, "message.created", entry.message);
  await page.pass(100);
  assert.deepEqual(set.last, thread.entries);
});

rule("events for entries whose page is on the way are kept, older ones dropped", async ({ page, server, thread, load, watch, api }) => {
  const entry = server.start(thread, "a");
  for (let i = 0; i < 5; i++) server.say(thread, `${i}`);
  server.page = 2;
  server.delta(thread, entry, "in the snapshot ");
  const set = recorder(page);
  watch(api.loadThread("t", set));
  // Each request takes 10 ms, an event 5.
  for (let i = 0; i < 40; i++) {
    server.delta(thread, entry, `${i} `);
    await page.pass(1);
  }
  await page.pass(100);
  assert.deepEqual(set.last, thread.entries);
});

rule("a page from another epoch starts the load again", async ({ page, server, thread, api, watch, streams }) => {
  server.page = 2;
  for (let i = 0; i < 5; i++) server.say(thread, `${i}`);
  server.fault = ({ method, url }) => {
    if (method !== "GET") return undefined;
    server.fault = () => undefined;
    const data = { data: [], has_more: false };
    return [200, { "Last-Event-ID": "another-7" }, data];
  };
  const set = recorder(page);
  const state = watch(api.loadThread("t", set));
  await page.pass(1000);
  assert.deepEqual(state.value, thread.entries);
  assert.equal(set.calls.length, 1);
  assert.equal(streams().length, 2);
});

rule("a message that vanished between two pages starts the load again", async ({ page, server, thread, api, watch }) => {
  server.page = 2;
  for (let i = 0; i < 5; i++) server.say(thread, `${i}`);
  server.fault = ({ method }) => {
    if (method !== "GET") return undefined;
    server.fault = () => undefined;
    thread.entries.splice(3, 1);
    return undefined;
  };
  const set = recorder(page);
  watch(api.loadThread("t", set));
  await page.pass(1000);
  assert.deepEqual(set.calls, [thread.entries]);
});

rule("pages that fail are tried again", async ({ page, server, thread, api, watch }) => {
  server.page = 2;
  for (let i = 0; i < 5; i++) server.say(thread, `${i}`);
  const faults = ["refuse", "lose", 500, 502, 503, 429, 408, "hang"];
  server.fault = () => faults.shift();
  const state = watch(api.loadThread("t", recorder(page)));
  await page.pass(120_000);
  assert.deepEqual(state.value, thread.entries);
});

rule("a snapshot drops what vanished and keeps what did not change", async ({ page, server, thread, load }) => {
  for (let i = 0; i < 4; i++) server.say(thread, `${i}`);
  const set = await load();
  const [gone] = thread.entries.splice(2, 1);
  server.snapshot([...server.sources][0]);
  await page.pass(100);
  assert.ok(!ids(set.last).includes(gone.message.id));
  assert.deepEqual(set.last, thread.entries);
  assert.deepEqual(set.last.map((entry) => set.calls[0].includes(entry)), [true, true, true]);
  server.snapshot([...server.sources][0]);
  await page.pass(100);
  assert.equal(set.calls.length, 2);
});

rule("after a snapshot, pages go back to what is known, and past what may have changed", async ({ page, server, thread, load, gets }) => {
  server.page = 2;
  for (let i = 0; i < 10; i++) server.say(thread, `${i}`);
  const open = server.start(thread, "a");
  for (let i = 0; i < 5; i++) server.say(thread, `later ${i}`);
  const set = await load();
  const pages = gets().length;
  server.finish(thread, open);
  thread.epoch = "new";
  server.cut([...server.sources][0]);
  await page.pass(1000);
  assert.deepEqual(set.last, thread.entries);
  assert.equal(gets().length - pages, 2);
  server.trim(thread, 0);
  server.cut([...server.sources][0]);
  server.say(thread, "unproven");
  server.trim(thread, 0);
  await page.pass(1000);
  assert.deepEqual(set.last, thread.entries);
  assert.equal(gets().length - pages, 2, "all that is known is over: the snapshot was enough");
});

// ---- runs

rule("run resolves with the finished run, after set got it", async ({ page, server, thread, api, posts, watch }) => {
  const set = recorder(page);
  const state = watch(api.run("t", "tutor", set).then((run) => ({ run, at: set.last })));
  await page.pass(100);
  assert.deepEqual(posts()[0].body, { assistant_ids: ["tutor"] });
  const [entry] = thread.entries;
  server.begin(thread, entry);
  server.delta(thread, entry, "Hello");
  await page.pass(100);
  assert.equal(text(set.last[0]), "Hello");
  assert.ok(!state.over);
  server.finish(thread, entry);
  await page.pass(100);
  assert.deepEqual(state.value.run, entry.run);
  assert.deepEqual(state.value.at, thread.entries);
  server.say(thread, "after it");
  await page.pass(100);
  assert.equal(set.last.length, 1);
  assert.equal(page.timers, 0);
});

rule("addMessageAndRuns sends the mode and resolves with the runs in order", async ({ page, server, thread, api, posts, watch }) => {
  const state = watch(api.addMessageAndRuns("t", "hello", ["a", "b"], recorder(page), { mode: "sequential" }));
  await page.pass(100);
  assert.deepEqual(posts()[0].body, { assistant_ids: ["a", "b"], content: "hello", mode: "sequential" });
  server.finish(thread, thread.entries[2]);
  await page.pass(100);
  assert.ok(!state.over);
  server.finish(thread, thread.entries[1], "incomplete");
  await page.pass(100);
  assert.deepEqual(state.value, [thread.entries[1].run, thread.entries[2].run]);
});

rule("addMessageAndRun resolves with the one run", async ({ page, server, thread, api, posts, watch }) => {
  const state = watch(api.addMessageAndRun("t", "hello", "a", recorder(page)));
  await page.pass(100);
  assert.deepEqual(posts()[0].body, { assistant_ids: ["a"], content: "hello" });
  server.finish(thread, thread.entries[1]);
  await page.pass(100);
  assert.deepEqual(state.value, thread.entries[1].run);
});

for (const status of ["incomplete", "cancelled"])
  rule(`a run that another made ${status} resolves`, async ({ page, server, thread, api, watch }) => {
    const state = watch(api.run("t", "a", recorder(page)));
    await page.pass(100);
    server.finish(thread, thread.entries[0], status);
    await page.pass(100);
    assert.equal(state.value.status, status);
  });

rule("a failed run rejects with its code and all runs, once all are over", async ({ page, server, thread, api, watch }) => {
  const set = recorder(page);
  const state = watch(api.addMessageAndRuns("t", "hello", ["a", "b"], set));
  await page.pass(100);
  server.finish(thread, thread.entries[1], "failed", "upstream_cut");
  await page.pass(100);
  assert.ok(!state.over);
  server.finish(thread, thread.entries[2]);
  await page.pass(100);
  assert.ok(state.error instanceof Error);
  assert.equal(state.error.code, "upstream_cut");
  assert.equal(state.error.message, "It broke.");
  assert.deepEqual(state.error.runs.map((run) => run.status), ["failed", "completed"]);
  assert.deepEqual(set.last, thread.entries);
});

rule("a run needs no set", async ({ page, server, thread, api, watch }) => {
  const states = [watch(api.run("t", "a")), watch(api.run("t", "a", null))];
  await page.pass(100);
  for (const entry of thread.entries) server.finish(thread, entry);
  await page.pass(100);
  assert.deepEqual(states.map(({ value }) => value.status), ["completed", "completed"]);
});

rule("a run's end is learned from a snapshot too", async ({ page, server, thread, api, watch }) => {
  const state = watch(api.run("t", "a", recorder(page)));
  await page.pass(100);
  server.failOpen = () => true;
  server.lose(thread);
  await page.pass(30_000);
  assert.ok(!state.over);
  server.failOpen = () => false;
  await page.pass(30_000);
  assert.equal(state.error.code, "worker_lost");
});

rule("a run whose entry is gone rejects", async ({ page, server, thread, api, watch }) => {
  const state = watch(api.run("t", "a", recorder(page)));
  await page.pass(100);
  thread.entries.length = 0;
  server.snapshot([...server.sources][0]);
  await page.pass(100);
  assert.equal(state.error.code, "run_not_found");
});

rule("an abort cancels each run that goes on, and set sees it", async ({ page, server, thread, api, posts, watch }) => {
  const stop = new AbortController();
  const set = recorder(page);
  const state = watch(api.addMessageAndRuns("t", "hello", ["a", "b"], set, { signal: stop.signal }));
  await page.pass(100);
  server.finish(thread, thread.entries[1]);
  await page.pass(100);
  const faults = ["refuse", 502, "lose"];
  server.fault = () => faults.shift();
  stop.abort();
  await page.pass(0);
  assert.equal(state.error.name, "AbortError");
  assert.deepEqual(state.error.runs.map(({ status }) => status), ["completed", "queued"]);
  await page.pass(20_000);
  assert.deepEqual([...new Set(posts().slice(1).map(({ url }) => new URL(url).pathname))],
    [`/p/threads/t/runs/${thread.entries[2].run.id}/cancel`]);
  assert.equal(set.last[2].run.status, "cancelled");
  assert.equal(page.timers, 0, "nobody is left on the stream");
});

rule("a cancel that is refused is nobody's error", async ({ page, server, api, watch }) => {
  const stop = new AbortController();
  const state = watch(api.run("t", "a", null, { signal: stop.signal }));
  await page.pass(100);
  server.fault = () => 500;
  stop.abort();
  await page.pass(100);
  assert.equal(state.error.name, "AbortError");
});

rule("an abort before run sends nothing", async ({ page, server, api, watch }) => {
  const stop = new AbortController();
  stop.abort();
  const state = watch(api.run("t", "a", recorder(page), { signal: stop.signal }));
  await page.pass(100);
  assert.equal(state.error.name, "AbortError");
  assert.equal(server.requests.length, 0);
});

rule("an abort while the POST is under way rejects at once and cancels once it is answered", async ({ page, server, thread, api, watch }) => {
  const stop = new AbortController();
  const set = recorder(page);
  const faults = ["lose"];
  server.fault = () => faults.shift();
  const state = watch(api.run("t", "a", set, { signal: stop.signal }));
  await page.pass(1);
  stop.abort();
  await page.pass(1);
  assert.equal(state.error.name, "AbortError");
  await page.pass(2000);
  assert.deepEqual(thread.entries.map(({ run }) => run.status), ["cancelled"]);
  assert.deepEqual(set.last, thread.entries);
  assert.equal(page.timers, 0);
});

// ---- how a thread reaches the page

rule("onstate tells each change of the stream's state, once, and nothing after the end", async ({ page, server, thread, api, watch }) => {
  const states = [], later = [];
  const stop = new AbortController();
  const onstate = (state) => states.push(state);
  watch(api.loadThread("t", recorder(page), { signal: stop.signal, onstate }));
  assert.deepEqual(states, []);
  await page.pass(100);
  server.say(thread, "hello");
  await page.pass(100);
  assert.deepEqual(states, ["connecting", "live"]);
  const running = watch(api.run("t", "a", null, { onstate: (state) => later.push(state) }));
  await page.pass(100);
  assert.deepEqual(later, ["live"]);
  server.cut([...server.sources][0]);
  await page.pass(1000);
  assert.deepEqual(states, ["connecting", "live", "connecting", "live"]);
  assert.deepEqual(later, ["live", "connecting", "live"]);
  server.finish(thread, thread.entries[1]);
  await page.pass(100);
  assert.equal(running.value.status, "completed");
  stop.abort();
  await page.pass(100);
  assert.deepEqual([states.length, later.length], [4, 3]);
});

rule("an onstate that throws is reported, and the stream goes on", async ({ page, server, thread, load }) => {
  const wrong = new Error("a bug in the page");
  const set = await load(undefined, { onstate: () => { throw wrong; } });
  server.say(thread, "hello");
  await page.pass(100);
  assert.deepEqual(set.last, thread.entries);
  assert.deepEqual(page.reported.splice(0), [wrong, wrong]);
});

/** A helper of its own, which has not warned of anything yet. */
let copies = 0;
const fresh = async (server) =>
  (await import(`${FILE.href}?fresh=${++copies}`)).createAssistream(
    { baseUrl: "http://server.test/p", fetch: server.fetch, EventSource: server.EventSource });

const signedOut = (server, body = { error: { code: "unauthenticated", message: "Sign in first." } }) => {
  server.failOpen = () => true;
  server.fault = () => [401, {}, body];
};
const signedIn = (server) => {
  server.failOpen = () => false;
  server.fault = () => undefined;
};

rule("a 401 of the app's own, in whatever words, is one too", async ({ page, server, thread, watch }) => {
  server.say(thread, "one");
  const api = await fresh(server), states = [];
  const state = watch(api.loadThread("t", recorder(page), { onstate: (now) => states.push(now) }));
  await page.pass(100);
  signedOut(server, { message: "Unauthorized" });
  server.cut([...server.sources][0]);
  await page.pass(60_000);
  assert.equal(states.at(-1), "unauthenticated");
  signedIn(server);
  await page.pass(16_000);
  assert.equal(states.at(-1), "live");
  assert.equal(state.error, undefined);
});

for (const how of ["time", "visibilitychange", "a POST"])
  rule(`a shown thread whose session ended says so and comes back by ${how} once signed in again`, async ({ page, server, thread, watch }) => {
    server.say(thread, "one");
    const api = await fresh(server), set = recorder(page), states = [];
    const state = watch(api.loadThread("t", set, { onstate: (now) => states.push(now) }));
    await page.pass(100);
    signedOut(server);
    server.cut([...server.sources][0]);
    server.say(thread, "two");
    await page.pass(600_000);
    assert.equal(states.at(-1), "unauthenticated");
    assert.equal(page.warned.length, 1);
    assert.match(page.warned[0], /401/);
    assert.equal(set.calls.length, 1);
    const asked = server.requests.length;
    await page.pass(60_000);
    assert.ok(server.requests.length - asked >= 4 && server.requests.length - asked <= 9, `${server.requests.length - asked}`);
    signedIn(server);
    if (how === "time") await page.pass(16_000);
    else if (how === "a POST") watch(api.addMessage("t", "three"));
    else page.fire(how);
    // The probe, then a short wait before the stream.
    await page.pass(1000);
    page.fire("online");
    await page.pass(100);
    assert.deepEqual(set.last, thread.entries);
    assert.equal(states.at(-1), "live");
    assert.ok(!state.error);
    assert.equal(page.warned.length, 1);
  });

rule("a command that got 401 rejects, and the shown thread goes on", async ({ page, server, thread, api, watch, load }) => {
  const set = await load();
  server.fault = ({ method }) => method === "POST" ? [401, {}, { error: { code: "unauthenticated", message: "No." } }] : undefined;
  const state = watch(api.run("t", "a"));
  await page.pass(100);
  assert.equal(state.error.code, "unauthenticated");
  server.say(thread, "hello");
  await page.pass(100);
  assert.deepEqual(set.last, thread.entries);
});

rule("a stream that a proxy holds back is told, polled, and taken up again when it speaks", async ({ page, server, thread, watch, gets, streams }) => {
  server.say(thread, "one");
  server.holds = () => true;
  const api = await fresh(server), set = recorder(page), states = [];
  const state = watch(api.loadThread("t", set, { onstate: (now) => states.push(now) }));
  await page.pass(9_000);
  assert.equal(gets().length, 0);
  await page.pass(9_000);
  assert.deepEqual(states, ["connecting", "polling"]);
  assert.match(page.warned[0], /X-Accel-Buffering.*docs\/guides\/deploy\.md/);
  assert.deepEqual(state.value, thread.entries);
  // Ten seconds apart while idle, two while a run is under way; at once after a POST.
  const running = watch(api.run("t", "a", set));
  await page.pass(100);
  assert.deepEqual(set.last, thread.entries);
  const entry = thread.entries[1];
  server.begin(thread, entry);
  for (let i = 0; i < 30; i++) {
    server.delta(thread, entry, `${i} `);
    await page.pass(1000);
  }
  assert.ok(set.calls.length >= 15, `${set.calls.length} calls`);
  server.finish(thread, entry);
  await page.pass(2100);
  assert.equal(running.value.status, "completed");
  assert.deepEqual(set.last, thread.entries);
  const before = gets().length;
  await page.pass(60_000);
  assert.ok(gets().length - before <= 7, `${gets().length - before} polls while idle`);
  page.hide(true);
  const hidden = gets().length;
  await page.pass(300_000);
  assert.ok(gets().length - hidden <= 6, `${gets().length - hidden} polls while hidden`);
  page.hide(false);
  assert.deepEqual(states, ["connecting", "polling"]);
  const tries = streams().length;
  server.holds = () => false;
  await page.pass(80_000);
  assert.ok(streams().length > tries);
  server.say(thread, "two");
  await page.pass(100);
  assert.equal(states.at(-1), "live");
  assert.deepEqual(set.last, thread.entries);
  const polls = gets().length;
  await page.pass(10_000);
  assert.equal(gets().length, polls);
  assert.equal(server.sources.size, 1);
  assert.equal(page.warned.length, 1);
});

rule("what a proxy lets go of late takes nothing back that polls have shown", async ({ page, server, thread, watch }) => {
  const entry = server.start(thread, "a");
  server.holds = () => true;
  const api = await fresh(server), set = recorder(page);
  watch(api.loadThread("t", set));
  await page.pass(80_000);
  assert.deepEqual(set.last, thread.entries);
  // One more stream was tried: what the proxy kept of it, a snapshot among it, comes now.
  const source = [...server.sources].at(-1) ?? await (async () => {
    for (let i = 0; i < 100 && !server.sources.size; i++) await page.pass(1000);
    return [...server.sources].at(-1);
  })();
  const old = { at: `${thread.epoch}-${thread.offset}`, data: JSON.stringify({ data: thread.entries, has_more: false }) };
  const first = thread.offset;
  server.delta(thread, entry, "one ");
  server.delta(thread, entry, "two ");
  await page.pass(3000);
  assert.equal(text(set.last[0]), "one two ");
  const calls = set.calls.length;
  source.dispatchEvent(new MessageEvent("thread.snapshot", { data: old.data, lastEventId: old.at }));
  await page.pass(100);
  assert.equal(set.calls.length, calls);
  for (const { name, data, offset } of thread.log.slice(first))
    source.dispatchEvent(new MessageEvent(name, { data, lastEventId: `${thread.epoch}-${offset}` }));
  await page.pass(100);
  assert.equal(set.calls.length, calls);
  assert.equal(text(set.last[0]), "one two ");
});

rule("a stream whose last words a proxy keeps is found out too", async ({ page, server, thread, watch }) => {
  const api = await fresh(server), set = recorder(page), states = [];
  watch(api.loadThread("t", set, { onstate: (now) => states.push(now) }));
  const running = watch(api.run("t", "a", set));
  await page.pass(100);
  const [entry] = thread.entries;
  server.delta(thread, entry, "one ");
  await page.pass(100);
  assert.equal(text(set.last[0]), "one ");
  server.holds = () => true;
  [...server.sources][0].held = true;
  server.delta(thread, entry, "two ");
  server.finish(thread, entry);
  await page.pass(30_000);
  assert.deepEqual(set.last, thread.entries);
  assert.equal(running.value.status, "completed");
  assert.deepEqual(page.warned, [], "it may have been a connection that died");
  await page.pass(30_000);
  assert.equal(states.at(-1), "polling");
  server.say(thread, "next");
  await page.pass(11_000);
  assert.equal(page.warned.length, 1);
  assert.deepEqual(set.last, thread.entries);
});

for (const [what, fault] of [["away", "refuse"], ["failing", 503], ["hanging", "hang"]])
  rule(`a server that is ${what} is no proxy that buffers`, async ({ page, server, thread, watch }) => {
    server.say(thread, "one");
    server.holds = () => true;
    server.fault = () => fault;
    const api = await fresh(server), set = recorder(page), states = [];
    watch(api.loadThread("t", set, { onstate: (now) => states.push(now) }));
    await page.pass(300_000);
    server.fault = () => undefined;
    server.holds = () => false;
    await page.pass(60_000);
    assert.deepEqual(page.warned, []);
    assert.deepEqual(new Set(states), new Set(["connecting", "live"]));
    assert.deepEqual(set.last, thread.entries);
  });

rule("a slow network is no proxy that buffers", async ({ page, server, thread, watch }) => {
  server.say(thread, "one");
  server.delay = () => 12_000;
  const api = await fresh(server), set = recorder(page);
  watch(api.loadThread("t", set));
  await page.pass(60_000);
  assert.deepEqual(page.warned, []);
  assert.deepEqual(set.last, thread.entries);
});

rule("a stream that goes on from its place and has nothing to say is asked about, and kept", async ({ page, server, thread, watch, streams }) => {
  server.say(thread, "one");
  const api = await fresh(server), states = [];
  watch(api.loadThread("t", recorder(page), { onstate: (now) => states.push(now) }));
  await page.pass(100);
  server.cut([...server.sources][0]);
  await page.pass(35_000);
  assert.deepEqual(page.warned, []);
  assert.deepEqual(states, ["connecting", "live", "connecting", "live"]);
  assert.equal(streams().length, 2);
});

// ---- the tabs of an origin

/** Other tabs: `streams` each, `hidden` since (0: visible); they answer as long as they live. */
const otherTab = (page, id, streams, hidden, origin = "http://server.test") => {
  const channel = new BroadcastChannel(`assistream ${origin}`);
  const heard = [];
  const tell = () => channel.postMessage({ id, streams, hidden });
  channel.onmessage = ({ data }) => {
    heard.push(data);
    if (data.ask) tell();
  };
  tell();
  return { heard, tell, close: () => channel.close(), change: (more) => { ({ streams = streams, hidden = hidden } = more); tell(); } };
};

rule("a hidden tab lets go of its stream when all tabs have more than four, and comes back where it was", async ({ page, server, thread, watch, streams, gets }) => {
  server.say(thread, "one");
  const api = await fresh(server), set = recorder(page), states = [];
  watch(api.loadThread("t", set, { onstate: (now) => states.push(now) }));
  const tabs = ["a", "b", "c", "d"].map((id) => otherTab(page, id, 1, 0));
  await page.pass(100);
  assert.equal(server.sources.size, 1, "a visible tab never lets go");
  page.hide(true);
  await page.pass(100);
  assert.equal(server.sources.size, 0);
  assert.deepEqual(states, ["connecting", "live", "paused"]);
  assert.equal(page.warned.length, 1);
  assert.match(page.warned[0], /HTTP\/1\.1.*HTTP\/2/);
  // With nothing under way it does not ask either.
  const asked = gets().length;
  server.say(thread, "two");
  await page.pass(300_000);
  assert.equal(gets().length, asked);
  page.hide(false);
  await page.pass(50);
  assert.equal(new URL(streams().at(-1)).searchParams.get("last_event_id"), `${thread.epoch}-1`);
  assert.deepEqual(set.last, thread.entries);
  assert.equal(states.at(-1), "live");
  // One that leaves makes room, in whatever tab.
  page.hide(true);
  await page.pass(100);
  assert.equal(states.at(-1), "paused");
  tabs[0].change({ streams: 0 });
  await page.pass(100);
  assert.equal(states.at(-1), "live");
  assert.equal(page.warned.length, 1);
  tabs.forEach((tab) => tab.close());
});

rule("the longest hidden let go first, and all tabs decide alike", async ({ page, server, thread, watch }) => {
  const api = await fresh(server), states = [];
  watch(api.loadThread("t", recorder(page), { onstate: (now) => states.push(now) }));
  page.hide(true);
  const since = page.now;
  const older = ["a", "b"].map((id) => otherTab(page, id, 1, since - 5));
  const newer = ["c", "d"].map((id) => otherTab(page, id, 1, since + 5));
  await page.pass(100);
  const visible = otherTab(page, "e", 1, 0);
  await page.pass(100);
  assert.equal(states.at(-1), "live", "three are before it: it is the fourth");
  older[0].change({ hidden: since + 9 });
  await page.pass(100);
  assert.equal(states.at(-1), "paused");
  visible.change({ streams: 0 });
  await page.pass(100);
  assert.equal(states.at(-1), "live");
  [...older, ...newer, visible].forEach((tab) => tab.close());
});

rule("a promise that waits in a tab that let go is settled all the same", async ({ page, server, thread, watch, gets }) => {
  const api = await fresh(server), set = recorder(page);
  const tabs = ["a", "b", "c", "d"].map((id) => otherTab(page, id, 1, 0));
  const running = watch(api.addMessageAndRuns("t", "hello", ["a", "b"], set));
  await page.pass(100);
  page.hide(true);
  await page.pass(100);
  assert.equal(server.sources.size, 0);
  server.begin(thread, thread.entries[1]);
  server.delta(thread, thread.entries[1], "one ");
  await page.pass(20_000);
  assert.deepEqual(set.last, thread.entries);
  server.finish(thread, thread.entries[1]);
  server.finish(thread, thread.entries[2]);
  await page.pass(10_000);
  assert.deepEqual(running.value?.map(({ status }) => status), ["completed", "completed"]);
  assert.deepEqual(set.last, thread.entries);
  const asked = gets().length;
  await page.pass(100_000);
  assert.equal(gets().length, asked);
  assert.equal(page.timers, 0);
  tabs.forEach((tab) => tab.close());
});

rule("a tab that is opened in the background and has to let go still loads", async ({ page, server, thread, watch }) => {
  server.say(thread, "one");
  page.hide(true);
  page.now += 1000;
  const api = await fresh(server), set = recorder(page);
  const tabs = ["a", "b", "c", "d"].map((id) => otherTab(page, id, 1, 0));
  server.delay = () => 50;
  const state = watch(api.loadThread("t", set));
  await page.pass(1000);
  assert.equal(server.sources.size, 0);
  assert.deepEqual(state.value, thread.entries);
  tabs.forEach((tab) => tab.close());
});

rule("tabs that vanish without a word are forgotten, tabs that sleep are not", async ({ page, server, watch }) => {
  const api = await fresh(server), states = [];
  watch(api.loadThread("t", recorder(page), { onstate: (now) => states.push(now) }));
  const tabs = ["a", "b", "c", "d"].map((id) => otherTab(page, id, 1, 0));
  page.hide(true);
  await page.pass(600_000);
  assert.equal(states.at(-1), "paused");
  page.sleep(36_000_000);
  await page.pass(1000);
  assert.equal(states.at(-1), "paused");
  tabs.forEach((tab) => tab.close());
  await page.pass(200_000);
  assert.equal(states.at(-1), "live");
});

rule("over HTTP/2 nothing is let go", async ({ page, server, watch }) => {
  const was = performance.getEntriesByType;
  performance.getEntriesByType = (type) => type === "resource"
    ? [{ name: "http://server.test/p/assistream.js", nextHopProtocol: "h2" }, { name: "http://other.test/", nextHopProtocol: "http/1.1" }] : [];
  try {
    const api = await fresh(server), states = [];
    watch(api.loadThread("t", recorder(page), { onstate: (now) => states.push(now) }));
    const tabs = ["a", "b", "c", "d"].map((id) => otherTab(page, id, 1, 0));
    page.hide(true);
    await page.pass(1000);
    assert.equal(states.at(-1), "live");
    assert.deepEqual(page.warned, []);
    tabs.forEach((tab) => tab.close());
  } finally {
    performance.getEntriesByType = was;
  }
});

rule("the channel is opened with the first stream and closed with the last, with a word", async ({ page, server, api, watch }) => {
  assert.equal(page.channels, 0);
  await Promise.all([api.createThread(), page.pass(50)]);
  assert.equal(page.channels, 0);
  const stop = new AbortController();
  watch(api.loadThread("t", recorder(page), { signal: stop.signal }));
  assert.equal(page.channels, 1);
  const tab = otherTab(page, "a", 1, 0);
  await page.pass(100);
  stop.abort();
  await page.pass(100);
  assert.equal(tab.heard.at(-1).streams, 0);
  assert.equal(page.channels, 1, "the other's");
  tab.close();
  assert.equal(page.timers, 0);
  // Where storage is forbidden there may be none.
  globalThis.BroadcastChannel = class { constructor() { throw new DOMException("No.", "SecurityError"); } };
  const state = watch(api.loadThread("t", recorder(page)));
  await page.pass(100);
  assert.deepEqual(state.value, []);
});

rule("a page that is left says so and has nothing open, and comes back where it was", async ({ page, server, thread, load, streams }) => {
  server.say(thread, "one");
  const set = await load();
  const tab = otherTab(page, "a", 1, 0);
  await page.pass(100);
  page.fire("pagehide");
  await page.pass(100);
  assert.equal(tab.heard.at(-1).streams, 0);
  assert.equal(page.channels, 1, "the other's");
  assert.equal(server.sources.size, 0);
  server.say(thread, "two");
  page.sleep(3_600_000);
  page.fire("pageshow");
  await page.pass(100);
  assert.equal(new URL(streams().at(-1)).searchParams.get("last_event_id"), `${thread.epoch}-1`);
  assert.deepEqual(set.last, thread.entries);
  assert.equal(tab.heard.at(-1).streams, 1);
  assert.equal(server.sources.size, 1);
  tab.close();
});

// ---- commands

rule("addMessage resolves with the entry, createThread with the id", async ({ page, server, thread, api, posts, watch }) => {
  const message = watch(api.addMessage("t", "hello"));
  const created = watch(api.createThread({ title: "New" }));
  await page.pass(100);
  assert.deepEqual(message.value, thread.entries[0]);
  assert.ok(server.threads.has(created.value));
  assert.deepEqual(posts().map(({ body }) => body), [{ content: "hello" }, { metadata: { title: "New" } }]);
  assert.ok(posts().every(({ init }) => init.credentials === "same-origin" && init.headers["Content-Type"] === "application/json"));
});

rule("a command keeps its key over all its tries, and has it alone", async ({ page, server, thread, api, posts, watch }) => {
  const faults = ["refuse", "lose", 502, 503, 504, 408];
  server.fault = () => faults.shift();
  const one = watch(api.addMessage("t", "once"));
  await page.pass(60_000);
  assert.deepEqual(one.value, thread.entries[0]);
  assert.equal(thread.entries.length, 1);
  assert.equal(posts().length, 7);
  assert.equal(new Set(posts().map(({ key }) => key)).size, 1);
  watch(api.addMessage("t", "once"));
  await page.pass(100);
  assert.equal(thread.entries.length, 2);
  assert.ok(posts().every(({ key }) => key.length >= 20 && key.length <= 255));
});

for (const status of [400, 401, 404, 409, 413, 415, 422, 500])
  rule(`a command that got ${status} rejects with the server's words`, async ({ page, server, api, posts, watch }) => {
    server.fault = () => [status, {}, { error: { type: "t", code: "some_code", message: "Do this." } }];
    const state = watch(api.addMessage("t", "hello"));
    await page.pass(60_000);
    assert.deepEqual([state.error.code, state.error.status, state.error.message], ["some_code", status, "Do this."]);
    assert.equal(posts().length, 1);
  });

rule("an error that is no JSON of ours still has a code", async ({ page, server, api, watch }) => {
  server.fault = () => 500;
  const state = watch(api.run("t", "a"));
  await page.pass(1000);
  assert.deepEqual([state.error.code, state.error.status], ["http_500", 500]);
});

for (const [header, tries] of [[{ "Retry-After": "3" }, 5], [{ "Retry-After": "6" }, 1], [{}, 5]])
  rule(`a command that got 429 with ${JSON.stringify(header)} is tried ${tries} times`, async ({ page, server, api, posts, watch }) => {
    server.fault = () => [429, header, { error: { code: "too_many_runs", message: "Wait." } }];
    const state = watch(api.run("t", "a"));
    await page.pass(header["Retry-After"] ? 2900 : 200);
    assert.equal(posts().length, 1);
    await page.pass(60_000);
    assert.equal(state.error.code, "too_many_runs");
    assert.equal(posts().length, tries);
  });

rule("a command that a proxy refuses for a while (429, a page of its own) is sent again, once", async ({ page, server, thread, api, watch, posts }) => {
  server.fault = () => 429;
  const state = watch(api.addMessage("t", "hello"));
  await page.pass(1000);
  server.fault = () => undefined;
  await page.pass(5000);
  assert.deepEqual(state.value, thread.entries[0]);
  assert.equal(thread.entries.length, 1);
  assert.equal(new Set(posts().map(({ key }) => key)).size, 1);
});

rule("a message typed offline arrives once the network is back", async ({ page, server, thread, api, watch }) => {
  navigator.onLine = false;
  server.fault = () => "refuse";
  const state = watch(api.addMessage("t", "hello"));
  await page.pass(3_600_000);
  assert.ok(!state.over);
  navigator.onLine = true;
  server.fault = () => undefined;
  page.fire("online");
  await page.pass(50);
  assert.deepEqual(state.value, thread.entries[0]);
});

rule("an outage of some seconds, as at a deploy, hides three more at most", async ({ page, server, thread, api, watch, load }) => {
  const set = await load();
  for (let outage = 1000; outage < 25_000; outage += 1700) {
    server.failOpen = () => true;
    server.fault = () => "refuse";
    server.cut([...server.sources][0]);
    const sent = watch(api.addMessage("t", `${outage}`));
    await page.pass(outage);
    server.failOpen = () => false;
    server.fault = () => undefined;
    await page.pass(3050);
    assert.ok(sent.value, `a command after ${outage} ms`);
    await page.pass(550);
    assert.deepEqual(set.last, thread.entries, `the stream after ${outage} ms`);
    await page.pass(60_000);
  }
});

rule("a command gives up when the network is there but no answer is, after minutes", async ({ page, server, api, watch }) => {
  server.fault = () => "refuse";
  const state = watch(api.addMessage("t", "hello"));
  await page.pass(60_000);
  assert.ok(!state.over);
  await page.pass(600_000);
  assert.equal(state.error.code, "network_error");
});

rule("an abort ends a command at once, and for good", async ({ page, server, api, posts, watch }) => {
  for (const fault of ["refuse", "hang", 503]) {
    server.fault = () => fault;
    const stop = new AbortController();
    const state = watch(api.addMessage("t", "hello", { signal: stop.signal }));
    await page.pass(20_000);
    stop.abort();
    await page.pass(0);
    assert.equal(state.error?.name, "AbortError", `after ${fault}`);
    const sent = posts().length;
    assert.ok(posts().at(-1).init.signal.aborted, `the connection is let go of after ${fault}`);
    await page.pass(120_000);
    assert.equal(posts().length, sent, `tries after ${fault}`);
  }
  assert.equal(page.timers, 0);
});

for (const [name, command] of [
  ["addMessage", (api, options) => api.addMessage("t", "hello", options)],
  ["createThread", (api, options) => api.createThread({}, options)],
])
  for (const options of [{ signal: new AbortController().signal }, {}])
    rule(`${name} that hangs is sent again after a minute, under its key, ${options.signal ? "with" : "without"} a signal`, async ({ page, server, posts, api, watch }) => {
      const faults = ["hang"];
      server.fault = () => faults.shift();
      const state = watch(command(api, options));
      await page.pass(59_000);
      assert.equal(posts().length, 1);
      await page.pass(5000);
      assert.ok(state.value, `${state.error}`);
      assert.equal(posts().length, 2);
      assert.equal(posts()[0].key, posts()[1].key);
      assert.equal(page.timers, 0);
    });

rule("listThreads resolves with the user's threads, newest first, a page at a time", async ({ page, server, api, gets, watch }) => {
  for (const id of ["u", "v", "w"]) server.thread(id);
  const [whole, first, second] = [{}, { limit: 2 }, { limit: 2, before: "v" }].map((options) => watch(api.listThreads(options)));
  const plain = watch(api.listThreads());
  await page.pass(100);
  const ids = ({ value }) => [value.data.map(({ id }) => id), value.has_more];
  assert.deepEqual([whole, first, second, plain].map(ids),
    [[["w", "v", "u", "t"], false], [["w", "v"], true], [["u", "t"], false], [["w", "v", "u", "t"], false]]);
  assert.deepEqual(gets().map(({ url }) => new URL(url).search), ["", "?limit=2", "?limit=2&before=v", ""]);
  assert.ok(gets().every(({ init }) => init.credentials === "same-origin"));
});

rule("listAssistants resolves with who can be asked", async ({ page, server, api, gets, watch }) => {
  const state = watch(api.listAssistants());
  await page.pass(100);
  assert.deepEqual(state.value, server.assistants);
  assert.deepEqual(gets().map(({ url }) => url), ["http://server.test/p/assistants"]);
});

rule("deleteThread resolves when the thread is gone, and who shows it gets nothing", async ({ page, server, thread, api, load, watch }) => {
  server.say(thread, "hello");
  const set = await load();
  const state = watch(api.deleteThread("t"));
  await page.pass(100);
  assert.deepEqual([state.over, state.value, state.error], [true, undefined, undefined]);
  assert.ok(!server.threads.has("t"));
  assert.deepEqual(set.last, []);
  const { method, url } = server.requests.at(-1);
  assert.deepEqual([method, url], ["DELETE", "http://server.test/p/threads/t"]);
  assert.equal(page.timers, 0);
});

rule("a deletion whose answer was lost is one all the same", async ({ page, server, api, watch }) => {
  const faults = ["lose"];
  server.fault = () => faults.shift();
  const state = watch(api.deleteThread("t"));
  await page.pass(5000);
  assert.deepEqual([state.over, state.error], [true, undefined]);
  assert.equal(server.requests.length, 2);
});

rule("deleteThread of none of the user's threads rejects", async ({ page, server, api, watch }) => {
  const state = watch(api.deleteThread("another's"));
  await page.pass(100);
  assert.deepEqual([state.error.code, state.error.status], ["thread_not_found", 404]);
  assert.equal(server.requests.length, 1);
});

rule("cancelRun cancels a run that another started, and set sees it", async ({ page, server, thread, api, load, posts, watch }) => {
  const { run } = server.start(thread, "a");
  const set = await load();
  const state = watch(api.cancelRun("t", run.id));
  await page.pass(100);
  assert.equal(state.value.id, run.id);
  assert.equal(state.value.status, "cancelled");
  assert.equal(set.last[0].run.status, "cancelled");
  assert.deepEqual(posts().map(({ url, body }) => [new URL(url).pathname, body]), [[`/p/threads/t/runs/${run.id}/cancel`, {}]]);
});

for (const [name, command] of [
  ["listThreads", (api, options) => api.listThreads(options)],
  ["deleteThread", (api, options) => api.deleteThread("t", options)],
  ["listAssistants", (api, options) => api.listAssistants(options)],
  ["cancelRun", (api, options) => api.cancelRun("t", "run_1", options)],
  ["submitToolOutputs", (api, options) => api.submitToolOutputs("t", "run_1", [{ tool_call_id: "call_4", output: 1 }], options)],
  ["approve", (api, options) => api.approve("t", "run_1", "call_5", options)],
  ["deny", (api, options) => api.deny("t", "run_1", "call_5", options)],
]) {
  rule(`${name} rejects with the server's words`, async ({ page, server, api, watch }) => {
    for (const status of [400, 401, 403, 500]) {
      server.requests.length = 0;
      server.fault = () => [status, {}, { error: { type: "t", code: "some_code", message: "Do this." } }];
      const state = watch(command(api));
      await page.pass(60_000);
      assert.deepEqual([state.error.code, state.error.status, state.error.message], ["some_code", status, "Do this."]);
      assert.equal(server.requests.length, 1);
    }
  });

  rule(`${name} is tried again while the server is away, for minutes`, async ({ page, server, thread, api, watch }) => {
    const entry = server.start(thread, "a");
    const [pick, refund] = [server.call(thread, entry, "pick", "page"), server.call(thread, entry, "refund")];
    server.require(thread, entry, { [pick]: "output", [refund]: "approval" });
    assert.deepEqual([entry.run.id, pick, refund], ["run_1", "call_4", "call_5"]);
    server.fault = () => "refuse";
    const [one, other] = [watch(command(api)), watch(command(api))];
    await page.pass(20_000);
    server.fault = () => undefined;
    await page.pass(3000);
    // A question is answered once.
    const errors = [one, other].flatMap(({ error }) => error ?? []).map(({ code }) => code);
    assert.ok(one.over && other.over);
    assert.deepEqual(errors, /^(submit|approve|deny)/.test(name) ? ["already_answered"] : []);
    server.fault = () => "refuse";
    const state = watch(command(api));
    await page.pass(600_000);
    assert.equal(state.error.code, "network_error");
    assert.equal(page.timers, 0);
  });

  rule(`an abort ends ${name} at once, and for good`, async ({ page, server, api, watch }) => {
    server.fault = () => "hang";
    const stop = new AbortController();
    const state = watch(command(api, { signal: stop.signal }));
    await page.pass(1000);
    stop.abort();
    await page.pass(0);
    assert.equal(state.error.name, "AbortError");
    assert.ok(server.requests.at(-1).init.signal.aborted);
    await page.pass(120_000);
    assert.equal(server.requests.length, 1);
    assert.equal(page.timers, 0);
  });
}

// ---- tool calls

rule("events of steps add up to what a snapshot has, at any time", async ({ page, server, thread, load }) => {
  const set = await load();
  const entry = server.start(thread, "a");
  const find = () => entry.steps.at(-1).step_details.tool_calls;
  const steps = [
    () => server.begin(thread, entry),
    () => server.think(thread, entry, "I look."),
    () => server.delta(thread, entry, "One moment."),
    () => server.call(thread, entry, "find"),
    () => server.grow(thread, entry, find()[0].id, { arguments: '{"quer' }),
    () => server.call(thread, entry, "pick", "page"),
    () => server.grow(thread, entry, find()[0].id, { arguments: 'y": 1}' }),
    () => server.grow(thread, entry, find()[1].id, { arguments: "{}" }),
    () => server.grow(thread, entry, find()[0].id, { started_at: 1 }),
    () => server.grow(thread, entry, find()[0].id, { status: "failed", output: "Timed out.", error: "timed out", completed_at: 2 }),
    // What is told twice takes the place of the first.
    () => server.grow(thread, entry, find()[0].id, { output: "Found." }),
    () => server.require(thread, entry, { [find()[1].id]: "output" }),
    () => server.answer(thread, entry, "output", [{ tool_call_id: find()[1].id, output: "today" }]),
    () => server.begin(thread, entry),
    () => server.delta(thread, entry, "But no", "refusal"),
    () => server.finish(thread, entry, "cancelled"),
  ];
  for (const step of steps) {
    step();
    await page.pass(100);
    assert.deepEqual(set.last, thread.entries);
    const fresh = createAssistream({ baseUrl: "http://server.test/p", fetch: server.fetch, EventSource: server.EventSource });
    const other = recorder(page, { onePerFrame: false }), stop = new AbortController();
    fresh.loadThread("t", other, stop).catch(() => {});
    await page.pass(100);
    assert.deepEqual(other.last, thread.entries);
    stop.abort();
    await page.pass(0);
  }
  assert.equal(set.last[0].steps[1].step_details.tool_calls[0].function.output, "Found.");
});

rule("parts are texts, reasoning and calls in the order in which they happened, under keys that stay", async ({ page, server, thread, load }) => {
  const set = await load();
  const entry = server.start(thread, "a");
  const keys = [];
  const look = async () => {
    await page.pass(100);
    const found = parts(set.last[0]);
    assert.deepEqual(found.slice(0, keys.length).map(({ key }) => key), keys);
    keys.splice(0, keys.length, ...found.map(({ key }) => key));
    assert.equal(new Set(keys).size, keys.length);
    return found;
  };
  server.begin(thread, entry);
  assert.deepEqual(await look(), []);
  server.think(thread, entry, "Hm.");
  server.delta(thread, entry, "I look");
  await look();
  server.delta(thread, entry, " it up.");
  const [first, second] = [server.call(thread, entry, "find"), server.call(thread, entry, "find")];
  server.grow(thread, entry, first, { arguments: "{}" });
  await look();
  server.grow(thread, entry, first, { status: "completed", output: "Found." });
  entry.steps.at(-1).status = "completed";
  server.emit(thread, "run.step.completed", entry.steps.at(-1));
  server.think(thread, entry, "Aha.");
  await look();
  server.delta(thread, entry, "No.", "refusal");
  const third = server.call(thread, entry, "note");
  const found = await look();
  assert.deepEqual(found.map((part) => [part.type, part.text ?? part.part?.text?.value ?? part.part?.refusal ?? part.call.id]), [
    ["reasoning", "Hm."], ["text", "I look it up."], ["tool_call", first], ["tool_call", second],
    ["reasoning", "Aha."], ["refusal", "No."], ["tool_call", third],
  ]);
  assert.equal(found[2].call, set.last[0].steps[1].step_details.tool_calls[0]);
  assert.equal(found[2].step, set.last[0].steps[1]);
  assert.equal(found[1].part, set.last[0].message.content[0]);
});

test("parts of a step that an older server told of come first", () => {
  const step = { id: "step_1", step_details: { type: "reasoning", reasoning: { text: "Hm." } } };
  const entry = freeze({ message: { id: "msg_1", run_id: null, content: [{ type: "text", text: { value: "a" } }] }, steps: [step] });
  assert.deepEqual(parts(entry).map(({ key, type }) => [key, type]), [["step_1", "reasoning"], ["msg_1-0", "text"]]);
});

/** A run that waits for the page's tool `pick`, and for a person's word on `refund`. */
const waits = (server, thread, given = '{"n": 1}') => {
  const entry = server.start(thread, "a");
  server.begin(thread, entry);
  const [pick, refund] = [server.call(thread, entry, "pick", "page"), server.call(thread, entry, "refund")];
  server.grow(thread, entry, pick, { arguments: given });
  server.grow(thread, entry, refund, { arguments: "{}" });
  server.require(thread, entry, { [pick]: "output", [refund]: "approval" });
  return { entry, pick, refund, run_id: entry.run.id };
};
const callOf = ({ steps }, id) => steps.flatMap(({ step_details }) => step_details.tool_calls ?? []).find((call) => call.id === id);

rule("submitToolOutputs, approve and deny send what was decided, and resolve with the run", async ({ page, server, thread, api, load, posts, watch }) => {
  const { entry, pick, refund, run_id } = waits(server, thread);
  const set = await load();
  const one = watch(api.submitToolOutputs("t", run_id, [{ tool_call_id: pick, output: { day: 1 } }]));
  await page.pass(100);
  assert.equal(one.value.status, "requires_action");
  assert.deepEqual(one.value.required_action.submit_tool_outputs.tool_calls.map(({ id }) => id), [refund]);
  const other = watch(api.approve("t", run_id, refund, { arguments: { cents: 5 }, remember: true }));
  await page.pass(100);
  assert.deepEqual([other.value.status, other.value.required_action], ["queued", null]);
  assert.deepEqual(set.last, thread.entries);
  assert.equal(callOf(set.last[0], refund).function.arguments, '{"cents":5}');
  const again = waits(server, thread);
  watch(api.deny("t", again.run_id, again.refund, { reason: "Too much." }));
  watch(api.submitToolOutputs("t", again.run_id, [{ tool_call_id: again.pick, output: "as it is" }]));
  await page.pass(100);
  assert.deepEqual(posts().map(({ url, body }) => [new URL(url).pathname.replace("/p/threads/t/runs/", ""), body]), [
    [`${run_id}/submit_tool_outputs`, { tool_outputs: [{ tool_call_id: pick, output: '{"day":1}' }] }],
    [`${run_id}/approvals`, { approvals: [{ tool_call_id: refund, approve: true, arguments: { cents: 5 }, remember: true }] }],
    [`${again.run_id}/approvals`, { approvals: [{ tool_call_id: again.refund, approve: false, reason: "Too much." }] }],
    [`${again.run_id}/submit_tool_outputs`, { tool_outputs: [{ tool_call_id: again.pick, output: "as it is" }] }],
  ]);
  assert.equal(entry.run.status, "queued");
});

rule("who answers second is told what was decided", async ({ page, server, thread, api, watch }) => {
  const { refund, run_id } = waits(server, thread);
  const [yes, no] = [watch(api.approve("t", run_id, refund)), watch(api.deny("t", run_id, refund, { reason: "No." }))];
  await page.pass(100);
  assert.equal(yes.value.id, run_id);
  const { code, status, decision } = no.error;
  assert.deepEqual([code, status, decision], ["already_answered", 409, { needs: "approval", at: 1, approve: true }]);
});

/** A tool that counts: what it was called with, and what gives its output, or ends it. */
const tool = () => {
  const calls = [];
  const pick = (args, about) => new Promise((give, fail) => calls.push({ args, ...about, give, fail }));
  return { calls, tools: { pick } };
};
const claims = (server) => server.requests.filter(({ url }) => url.endsWith("/claim"));
const answers = (server) => server.requests.filter(({ url }) => url.endsWith("/submit_tool_outputs"));

rule("of two tabs one executes a call, once, and both see its output", async ({ page, server, thread, api, watch }) => {
  const other = createAssistream({ baseUrl: "http://server.test/p", fetch: server.fetch, EventSource: server.EventSource });
  const { calls, tools } = tool();
  const sets = [recorder(page), recorder(page, { onePerFrame: false })];
  watch(api.loadThread("t", sets[0], { tools }));
  watch(other.loadThread("t", sets[1], { tools }));
  await page.pass(100);
  const { entry, pick, refund } = waits(server, thread);
  await page.pass(100);
  assert.equal(calls.length, 1);
  assert.deepEqual(calls[0].args, { n: 1 });
  assert.deepEqual(calls[0].call, { id: pick, type: "function", function: { name: "pick", arguments: '{"n": 1}' }, needs: "output" });
  assert.equal(new Set(claims(server).map(({ body }) => body.holder)).size, 2);
  // Whatever else happens in the thread.
  server.say(thread, "hello");
  await page.pass(5000);
  calls[0].give({ day: 1 });
  await page.pass(100);
  assert.deepEqual(callOf(entry, pick).function.output, '{"day":1}');
  assert.equal(answers(server).length, 1);
  for (const set of sets) assert.deepEqual(set.last, thread.entries);
  server.answer(thread, entry, "approval", [{ tool_call_id: refund, approve: true }]);
  server.begin(thread, entry);
  await page.pass(120_000);
  assert.deepEqual([calls.length, answers(server).length], [1, 1]);
});

rule("a call is claimed before it is executed, by the page's one name", async ({ page, server, thread, load }) => {
  const { calls, tools } = tool();
  await load(undefined, { tools });
  server.delay = () => 50;
  waits(server, thread);
  waits(server, thread, "{}");
  await page.pass(120);
  assert.deepEqual([claims(server).length, calls.length], [2, 0]);
  await page.pass(100);
  assert.deepEqual(calls.map(({ args }) => args), [{ n: 1 }, {}]);
  const [first, second] = claims(server);
  assert.equal(first.body.holder, second.body.holder);
  assert.match(first.body.holder, /^[\d-]{20,255}$/);
});

rule("a call of a page that is gone is taken once its claim ran out", async ({ page, server, thread, load }) => {
  const { entry, pick } = waits(server, thread);
  server.claim(entry, pick, "a page that is gone");
  const { calls, tools } = tool();
  await load(undefined, { tools });
  await page.pass(89_000);
  assert.equal(calls.length, 0);
  await page.pass(21_500);
  assert.equal(calls.length, 1);
  calls[0].give("today");
  await page.pass(100);
  assert.equal(callOf(entry, pick).function.output, "today");
});

rule("a page that is gone lets go of what it was executing, and of nothing else", async ({ page, server, thread, load }) => {
  const { entry, pick } = waits(server, thread);
  const { calls, tools } = tool();
  await load(undefined, { tools });
  assert.equal(calls.length, 1);
  // One that is kept for the back button goes on executing.
  page.fire("pagehide", { persisted: true });
  await page.pass(100);
  assert.deepEqual(claims(server).map(({ body }) => body.release), [undefined]);
  page.fire("pagehide", { persisted: false });
  await page.pass(100);
  const last = claims(server).at(-1);
  assert.deepEqual([last.body.release, last.body.holder, last.init.keepalive], [true, claims(server)[0].body.holder, true]);
  assert.equal(server.claim(entry, pick, "another page")[0], 200);
});

rule("an output that is on its way keeps its claim when the page goes", async ({ page, server, thread, load }) => {
  const { entry, pick } = waits(server, thread);
  const { calls, tools } = tool();
  await load(undefined, { tools });
  server.delay = () => 1000;
  calls[0].give("Monday");
  await page.pass(100);
  page.fire("pagehide", { persisted: false });
  await page.pass(100);
  assert.deepEqual(claims(server).map(({ body }) => body.release), [undefined]);
  await page.pass(1000);
  assert.equal(callOf(entry, pick).function.output, "Monday");
});

for (const [words, seconds, passing, renewals] of [
  ["three times in the time that it is for", 3, 10_500, 10],
  // A longer timer than of 24 days fires at once.
  ["each hour where that is for years", 1e9, 3_700_000, 1],
]) rule(`a claim is renewed ${words}`, async ({ page, server, thread, load }) => {
  const { entry, pick } = waits(server, thread);
  const { tools } = tool();
  const given = server.claim.bind(server);
  server.claim = (...about) => {
    const [status, answer] = given(...about);
    return [status, status === 200 ? { ...answer, seconds } : answer];
  };
  await load(undefined, { tools });
  const before = claims(server).length;
  await page.pass(passing);
  assert.equal(claims(server).length - before, renewals);
  assert.equal(server.grants.get(pick), 1);
  assert.equal(callOf(entry, pick).status, "requires_action");
});

rule("a claim is renewed for as long as the tool works", async ({ page, server, thread, load, api, watch }) => {
  const { entry, pick } = waits(server, thread);
  const { calls, tools } = tool();
  await load(undefined, { tools });
  const other = createAssistream({ baseUrl: "http://server.test/p", fetch: server.fetch, EventSource: server.EventSource });
  const second = tool();
  watch(other.loadThread("t", recorder(page, { onePerFrame: false }), { tools: second.tools }));
  // The server is away for a while: no renewal is missed for good.
  await page.pass(100_000);
  server.fault = ({ url }) => (url.endsWith("/claim") ? "refuse" : undefined);
  await page.pass(30_000);
  server.fault = () => undefined;
  await page.pass(100_000);
  assert.deepEqual([calls.length, second.calls.length], [1, 0]);
  assert.equal(server.grants.get(pick), 1);
  calls[0].give("at last");
  await page.pass(100);
  assert.equal(callOf(entry, pick).function.output, "at last");
  const sent = claims(server).length;
  await page.pass(120_000);
  assert.equal(claims(server).length, sent);
});

for (const [what, end, output] of [
  ["an error", (call) => call.fail(new Error("No calendar.")), '{"error":"No calendar."}'],
  ["what is no error", (call) => call.fail("not today"), '{"error":"not today"}'],
  ["nothing", (call) => call.fail(), '{"error":"undefined"}'],
])
  rule(`a tool that throws ${what} tells the model so`, async ({ page, server, thread, load }) => {
    const { entry, pick } = waits(server, thread);
    const { calls, tools } = tool();
    await load(undefined, { tools });
    end(calls[0]);
    await page.pass(100);
    assert.equal(callOf(entry, pick).function.output, output);
  });

for (const [given, output] of [["as it is", "as it is"], ["", ""], [undefined, "null"], [null, "null"], [[1, "a"], '[1,"a"]'], [false, "false"]])
  rule(`an output ${JSON.stringify(given)} is told as ${JSON.stringify(output)}`, async ({ page, server, thread, load }) => {
    const { entry, pick } = waits(server, thread);
    await load(undefined, { tools: { pick: () => given } });
    await page.pass(100);
    assert.equal(callOf(entry, pick).function.output, output);
  });

rule("arguments that are no JSON are no reason to wait for ever", async ({ page, server, thread, load }) => {
  const { entry, pick } = waits(server, thread, '{"n": ');
  const { calls, tools } = tool();
  await load(undefined, { tools });
  await page.pass(100);
  assert.equal(calls.length, 0);
  assert.match(callOf(entry, pick).function.output, /^{"error":".*JSON/);
});

for (const [how, end] of [
  ["was answered elsewhere", ({ server, thread, entry, pick }) => server.answer(thread, entry, "output", [{ tool_call_id: pick, output: "here" }])],
  ["vanished with its run", ({ server, thread }) => { thread.entries.length = 0; server.lose(thread); }],
  ["went with its run", ({ server, thread, entry }) => server.finish(thread, entry, "cancelled")],
  ["went with its thread", ({ server, thread }) => server.delete(thread)],
  ["is of a thread that nobody shows any more", ({ stop }) => stop.abort()],
])
  rule(`a tool is told to stop whose call ${how}, and what it gives is sent nowhere`, async ({ page, server, thread, load }) => {
    const { entry, pick } = waits(server, thread);
    const { calls, tools } = tool();
    const stop = new AbortController();
    await load(undefined, { tools, signal: stop.signal });
    assert.ok(!calls[0].signal.aborted);
    end({ server, thread, entry, pick, stop });
    await page.pass(1000);
    assert.ok(calls[0].signal.aborted);
    calls[0].give("too late");
    await page.pass(60_000);
    assert.equal(answers(server).length, 0);
  });

rule("what waited before the page was loaded is executed, and once, though an answer is lost and a snapshot comes", async ({ page, server, thread, load, streams }) => {
  const { entry, pick } = waits(server, thread);
  const { calls, tools } = tool();
  const faults = ["lose", "lose"];
  server.fault = ({ url }) => (url.endsWith("outputs") ? faults.shift() : undefined);
  await load(undefined, { tools });
  calls[0].give("once");
  await page.pass(30_000);
  assert.equal(callOf(entry, pick).function.output, "once");
  assert.equal(new Set(answers(server).map(({ key }) => key)).size, 1);
  const again = waits(server, thread);
  await page.pass(100);
  assert.equal(calls.length, 2);
  server.cut([...server.sources][0]);
  thread.epoch = "new";
  await page.pass(5000);
  assert.equal(streams().length, 2);
  assert.equal(calls.length, 2);
  calls[1].give("twice");
  await page.pass(100);
  assert.equal(callOf(again.entry, again.pick).function.output, "twice");
});

rule("a call that was answered is not executed again before the stream says so", async ({ page, server, thread, load }) => {
  for (const answer of [[200, {}, {}], [409, {}, { error: { code: "already_answered", message: "No." } }]]) {
    const { calls, tools } = tool();
    const stop = new AbortController();
    server.fault = ({ url }) => (url.endsWith("outputs") ? answer : undefined);
    const { entry } = waits(server, thread);
    await load(undefined, { tools, signal: stop.signal });
    calls[0].give("today");
    await page.pass(100);
    server.say(thread, "hello");
    await page.pass(30_000);
    assert.equal(calls.length, 1);
    server.finish(thread, entry);
    stop.abort();
    await page.pass(100);
  }
});

rule("a run that waits is not over, and one that nobody answers ends as expired", async ({ page, server, thread, api, watch }) => {
  const set = recorder(page);
  const state = watch(api.run("t", "a", set));
  await page.pass(100);
  const [entry] = thread.entries;
  server.begin(thread, entry);
  server.require(thread, entry, { [server.call(thread, entry, "refund")]: "approval" });
  await page.pass(3_600_000);
  assert.ok(!state.over);
  server.finish(thread, entry, "expired");
  await page.pass(100);
  assert.equal(state.value.status, "expired");
  assert.deepEqual(set.last, thread.entries);
});

rule("what needs a person, another tool or another round is not executed", async ({ page, server, thread, load }) => {
  const { calls, tools } = tool();
  const entry = server.start(thread, "a");
  server.begin(thread, entry);
  const names = ["refund", "toString", "hasOwnProperty", "find"];
  const made = names.map((name) => server.call(thread, entry, name, "page"));
  server.call(thread, entry, "pick", "page");
  server.require(thread, entry, Object.fromEntries(made.map((id, i) => [id, i ? "output" : "approval"])));
  await load(undefined, { tools: { ...tools, refund: tools.pick } });
  await page.pass(1000);
  assert.deepEqual([calls.length, claims(server).length], [0, 0]);
});

rule("the tools of any subscription are used, those of run and of addMessageAndRun too", async ({ page, server, thread, api, load, watch }) => {
  const set = await load();
  const { calls, tools } = tool();
  const running = [watch(api.run("t", "a", null, { tools })), watch(api.addMessageAndRun("t", "hello", "b", set, { tools }))];
  await page.pass(100);
  assert.ok(server.requests.every(({ body }) => !body?.tools));
  for (const entry of thread.entries.filter(({ run }) => run)) {
    server.begin(thread, entry);
    const id = server.call(thread, entry, "pick", "page");
    server.grow(thread, entry, id, { arguments: "{}" });
    server.require(thread, entry, { [id]: "output" });
    await page.pass(100);
    assert.ok(running.some(({ over }) => !over));
    calls.at(-1).give("today");
    await page.pass(100);
    assert.equal(callOf(entry, id).function.output, "today");
    server.begin(thread, entry);
    server.finish(thread, entry);
  }
  await page.pass(100);
  assert.deepEqual(running.map(({ value }) => value?.status), ["completed", "completed"]);
  // Whose subscription is over executes nothing any more.
  waits(server, thread);
  await page.pass(1000);
  assert.equal(calls.length, 2);
});

rule("an output that the server refuses is reported to the page", async ({ page, server, thread, load }) => {
  waits(server, thread);
  server.fault = ({ url }) => (url.endsWith("outputs") ? [413, {}, { error: { code: "message_too_long", message: "Too long." } }] : undefined);
  await load(undefined, { tools: { pick: () => "x" } });
  await page.pass(60_000);
  assert.deepEqual(page.reported.splice(0).map(({ code }) => code), ["message_too_long"]);
  assert.equal(answers(server).length, 1);
});

// ---- where it is

for (const [baseUrl, wanted] of [
  ["http://server.test/p", "http://server.test/p/threads"],
  ["http://server.test/app/p/", "http://server.test/app/p/threads"],
  ["/p", "http://page.test/p/threads"],
  ["../p/", "http://page.test/p/threads"],
  ["p", "http://page.test/chat/p/threads"],
])
  rule(`baseUrl ${baseUrl} is where the blueprint is`, async ({ page, server }) => {
    server.fault = () => "refuse";
    createAssistream({ baseUrl, fetch: server.fetch }).createThread().catch(() => {});
    await page.pass(10);
    assert.equal(server.requests[0].url, wanted);
  });

rule("an id is one segment of the path, whatever it holds", async ({ page, server, api }) => {
  server.fault = () => 404;
  api.addMessage("a/../b?c", "hello").catch(() => {});
  await page.pass(10);
  assert.equal(server.requests[0].url, "http://server.test/p/threads/a%2F..%2Fb%3Fc/messages");
});

rule("the file that the blueprint serves finds it from its own address, query or not", async ({ page, server }) => {
  const was = [globalThis.fetch, globalThis.EventSource];
  for (const query of ["", "?v=2#x"]) {
    const { createThread, loadThread } = await import(FILE.href + query);
    // Looked up when called, not when imported; a browser's fetch takes no other `this`.
    globalThis.fetch = function (...args) {
      assert.equal(this, undefined);
      return server.fetch(...args);
    };
    globalThis.EventSource = server.EventSource;
    server.fault = () => 400;
    server.requests.length = 0;
    createThread().catch(() => {});
    loadThread("t", () => {}).catch(() => {});
    await page.pass(10);
    assert.deepEqual(server.requests.slice(0, 2).map(({ url }) => url).sort(),
      [new URL("threads", FILE).href, new URL("threads/t/events", FILE).href]);
  }
  [globalThis.fetch, globalThis.EventSource] = was;
});

test("importing does no work and needs no browser", () => {
  const code = `delete globalThis.fetch; delete globalThis.EventSource; delete globalThis.crypto;
    const before = Object.keys(globalThis).length;
    const m = await import(${JSON.stringify(FILE.href)});
    if (Object.keys(globalThis).length !== before) throw new Error("a global was made");
    console.log(Object.keys(m).sort().join(" "));`;
  const out = execFileSync(process.execPath, ["--input-type=module", "-e", code], { timeout: 10_000, encoding: "utf8" });
  assert.equal(out.trim(), "addMessage addMessageAndRun addMessageAndRuns approve cancelRun createAssistream " +
    "createThread deleteThread deny listAssistants listThreads loadThread parts run submitToolOutputs text");
  assert.ok(fileURLToPath(FILE));
});

test("text is all texts and refusals of an entry, as paragraphs", () => {
  const entry = (...content) => freeze({ assistant_id: null, message: { content }, run: null, steps: [] });
  assert.equal(text(entry()), "");
  const said = (value) => ({ type: "text", text: { value, annotations: [] } });
  assert.equal(text(entry(said("a"), { type: "image_file" }, said(""), { type: "refusal", refusal: "b" })), "a\n\nb");
});
